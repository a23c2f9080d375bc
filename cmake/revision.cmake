# Writes generated/core/revision.h: ANYEP_VERSION "0.1.0" and ANYEP_REVISION "4a291c3" ("unknown" outside git). Runs again
# when HEAD moves, and touches the file only when the text changes.
# Also its own script: cmake -DOUTPUT=... -DSOURCE=... -DVERSION=... -P revision.cmake

if(CMAKE_SCRIPT_MODE_FILE)
  set(revision unknown)
  find_program(GIT git)
  if(GIT)
    execute_process(COMMAND "${GIT}" -C "${SOURCE}" rev-parse --short=10 HEAD
                    OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
    if(NOT failed)
      set(revision "${found}")
    endif()
  endif()
  file(CONFIGURE OUTPUT "${OUTPUT}" CONTENT
       "#pragma once\n#define ANYEP_VERSION \"${VERSION}\"\n#define ANYEP_REVISION \"${revision}\"\n")
  return()
endif()

set(ANYEP_REVISION_HEADER "${PROJECT_BINARY_DIR}/generated/core/revision.h")
set(watched)
find_program(ANYEP_GIT git)
mark_as_advanced(ANYEP_GIT)
if(ANYEP_GIT)
  execute_process(COMMAND "${ANYEP_GIT}" -C "${PROJECT_SOURCE_DIR}" rev-parse --git-path logs/HEAD
                  OUTPUT_VARIABLE log OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  cmake_path(ABSOLUTE_PATH log BASE_DIRECTORY "${PROJECT_SOURCE_DIR}")
  if(NOT failed AND EXISTS "${log}")
    set(watched "${log}")
  endif()
endif()
add_custom_command(
  OUTPUT "${ANYEP_REVISION_HEADER}"
  COMMAND "${CMAKE_COMMAND}" "-DOUTPUT=${ANYEP_REVISION_HEADER}" "-DSOURCE=${PROJECT_SOURCE_DIR}"
          "-DVERSION=${PROJECT_VERSION}" -P "${CMAKE_CURRENT_LIST_FILE}"
  DEPENDS ${watched} "${CMAKE_CURRENT_LIST_FILE}" COMMENT "Git revision" VERBATIM)
