# Language level, CUDA, build type, sanitizers, compiler cache and linker.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "" FORCE)
endif()

# What is built says nothing of where: paths in messages and in debug information begin at the root of the sources.
set(HW_PREFIX_MAPS -ffile-prefix-map=${PROJECT_BINARY_DIR}=build -ffile-prefix-map=${PROJECT_SOURCE_DIR}/=)
add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:${HW_PREFIX_MAPS}>")
foreach(map ${HW_PREFIX_MAPS})
  add_compile_options("$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Xcompiler ${map}>")
endforeach()

# -g1 keeps line numbers in stack traces at a fraction of the size and the link time of -g.
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -g1")

find_program(HW_CCACHE ccache)
if(HW_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${HW_CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${HW_CCACHE})
endif()
find_program(HW_MOLD mold)
if(HW_MOLD)
  add_link_options(-fuse-ld=mold)
endif()

if(HW_SANITIZE)
  string(REPLACE ";" "," HW_SANITIZE_LIST "${HW_SANITIZE}")
  add_compile_options(-fsanitize=${HW_SANITIZE_LIST} -fno-omit-frame-pointer)
  # GCC 12 takes optionals that hold nothing for uninitialised ones in instrumented code.
  add_compile_options($<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU>>:-Wno-maybe-uninitialized>)
  add_link_options(-fsanitize=${HW_SANITIZE_LIST})
  if(HW_SANITIZE MATCHES thread AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # Headers of Abseil's flags use a fence, which GCC warns about here. No code of the project does.
    add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Wno-tsan>)
  endif()
endif()

if(HW_FUZZ)
  # Coverage for libFuzzer in all code of the project; what is linked from packages is not instrumented.
  add_compile_options(-O1 -fsanitize=fuzzer-no-link)
endif()

if(NOT HW_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES 90a-real CACHE STRING "")
    enable_language(CUDA)
    # CMake 3.25 does not know that nvcc 13 speaks C++20.
    if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
      list(APPEND CMAKE_CUDA_COMPILE_FEATURES cuda_std_20)
    endif()
    set(HW_HAVE_CUDA ON)
  elseif(HW_CUDA STREQUAL "ON")
    message(FATAL_ERROR "HW_CUDA=ON, but no CUDA compiler was found (set CUDACXX to nvcc's path)")
  endif()
endif()
message(STATUS "Headwater: service ${HW_SERVICE}, CUDA ${HW_HAVE_CUDA}, sanitizers '${HW_SANITIZE}'")
