# cmake -DOUTPUT=x.cc -DHEADER=x.h "-DNAMES=kA;kB" "-DFILES=a;b" -P EmbedText.cmake: text files as constants of a C++ source.
set(code "// Written by cmake/EmbedText.cmake.\n#include \"${HEADER}\"\n\nnamespace headwater {\n")
foreach(name file IN ZIP_LISTS NAMES FILES)
  file(READ ${file} text)
  string(APPEND code "\nextern const char ${name}[] = R\"embedded(${text})embedded\";\n")
endforeach()
string(APPEND code "\n}  // namespace headwater\n")
file(WRITE ${OUTPUT} "${code}")
