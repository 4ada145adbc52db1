// Numbers in messages.
#ifndef HW_KERNELS_NUMBER_TEXT_H_
#define HW_KERNELS_NUMBER_TEXT_H_

#include <charconv>
#include <string>

namespace headwater::kernels {

// The shortest decimal text that reads back as the same float or double: "-1", "0.1", "1e-09", "nan".
template <typename Real>
std::string NumberText(Real value) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof(text), value).ptr};
}

}  // namespace headwater::kernels

#endif  // HW_KERNELS_NUMBER_TEXT_H_
