// The files of the live page, in the program: page.html, page.css and the two scripts.
#ifndef HW_COORDINATOR_PAGE_PAGE_FILES_H_
#define HW_COORDINATOR_PAGE_PAGE_FILES_H_

namespace headwater {

extern const char kPageHtml[];
extern const char kPageCss[];
extern const char kPagePartsJs[];
extern const char kPageJs[];

}  // namespace headwater

#endif  // HW_COORDINATOR_PAGE_PAGE_FILES_H_
