# Targets of the project. target_link_libraries is the architecture diagram; tests/layering holds it.

add_library(hw_warnings INTERFACE)
target_compile_options(hw_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -Werror>)

# hw_library(NAME SOURCES a.cc ... [HEADERS a.h ...] [DEPS ...] [PRIVATE_DEPS ...]): HEADERS are those that are installed,
# for other programs (cmake/HwInstall.cmake).
function(hw_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;HEADERS;DEPS;PRIVATE_DEPS" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  target_compile_features(${name} PUBLIC cxx_std_20)
  target_include_directories(${name} PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}>)
  target_link_libraries(${name} PUBLIC ${ARG_DEPS} PRIVATE $<BUILD_INTERFACE:hw_warnings> ${ARG_PRIVATE_DEPS})
  if(ARG_HEADERS)
    target_sources(${name} PUBLIC FILE_SET HEADERS BASE_DIRS ${PROJECT_SOURCE_DIR} FILES ${ARG_HEADERS})
  endif()
endfunction()

# What the thread sanitizer cannot see by itself: how packaged libraries, which are not instrumented, order accesses.
if(HW_SANITIZE MATCHES thread)
  add_library(hw_tsan_edges OBJECT cmake/tsan/openmp.cc)
  target_include_directories(hw_tsan_edges PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(hw_tsan_edges PUBLIC ${CMAKE_DL_LIBS})
endif()
function(hw_instrument name)
  if(TARGET hw_tsan_edges)
    target_link_libraries(${name} PRIVATE hw_tsan_edges)
  endif()
endfunction()

# hw_binary(NAME SOURCES ... DEPS ...): the executable is written to build/<preset>/bin.
function(hw_binary name)
  cmake_parse_arguments(ARG "" "OUTPUT" "SOURCES;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} hw_warnings)
  hw_instrument(${name})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bin)
endfunction()

# hw_test(NAME SOURCES ... DEPS ... [LABELS cpu|service|gpu1|gpu2|slow] [TIMEOUT s]): one ctest for the whole GoogleTest binary.
function(hw_test name)
  if(NOT BUILD_TESTING)
    return()
  endif()
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;DEPS;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  if(NOT ARG_LABELS)
    set(ARG_LABELS cpu)
  endif()
  find_package(GTest REQUIRED)
  add_executable(${name} ${ARG_SOURCES})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} GTest::gmock GTest::gtest_main hw_warnings)
  hw_instrument(${name})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
  add_test(NAME ${name} COMMAND ${name})
  # Tests share the cores with other tests: idle OpenMP threads must not spin.
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT}
    ENVIRONMENT "OMP_WAIT_POLICY=passive")
endfunction()
