# cmake -DSOURCE=DIR -DOUTPUT=FILE -P HwCommit.cmake: writes the commit of the sources, with a '+' where they were changed since,
# as a header; leaves the file alone where it says so already.
cmake_minimum_required(VERSION 3.25)
set(ENV{GIT_OPTIONAL_LOCKS} 0)
# Sources unpacked within another project's tree are not of its commit.
cmake_path(GET SOURCE PARENT_PATH above)
set(ENV{GIT_CEILING_DIRECTORIES} ${above})
find_program(HW_GIT git)
if(HW_GIT)
  execute_process(COMMAND ${HW_GIT} -C ${SOURCE} describe --always --abbrev=12 --exclude=* --dirty=+
    OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
if(NOT commit)
  set(commit unknown)
endif()
file(CONFIGURE OUTPUT ${OUTPUT} CONTENT "#define HW_COMMIT \"@commit@\"\n" @ONLY)
