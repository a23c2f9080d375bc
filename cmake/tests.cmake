# Each folder tests/<name> with .cc files is one executable test_<name>, registered with ctest; a folder with its own
# CMakeLists.txt looks after itself, tests/package is a project of its own. tests/support is linked into all of them; a main()
# there takes the place of gmock's.
find_package(GTest REQUIRED)

add_library(anyep_test_base INTERFACE)
target_link_libraries(anyep_test_base INTERFACE anyep_objects anyep_reference GTest::gmock)
target_include_directories(anyep_test_base INTERFACE "${PROJECT_SOURCE_DIR}" "${PROJECT_SOURCE_DIR}/tests")
target_compile_definitions(anyep_test_base INTERFACE ANYEP_SOURCE_DIR="${PROJECT_SOURCE_DIR}")

file(GLOB support_sources CONFIGURE_DEPENDS tests/support/*.cc)
if(support_sources)
  add_library(anyep_test_support OBJECT ${support_sources})
  target_link_libraries(anyep_test_support PRIVATE anyep_warnings PUBLIC anyep_test_base)
else()
  add_library(anyep_test_support INTERFACE)
  target_link_libraries(anyep_test_support INTERFACE anyep_test_base)
endif()

file(GLOB test_folders CONFIGURE_DEPENDS LIST_DIRECTORIES true tests/*)
list(FILTER test_folders EXCLUDE REGEX "/(support|package)$")
foreach(folder ${test_folders})
  cmake_path(GET folder FILENAME name)
  file(GLOB sources CONFIGURE_DEPENDS "${folder}/*.cc")
  if(EXISTS "${folder}/CMakeLists.txt")
    add_subdirectory("${folder}" "tests/${name}")
  elseif(sources)
    add_executable(test_${name} ${sources})
    # anyep_objects once more: objects do not travel through an interface library.
    target_link_libraries(test_${name} PRIVATE anyep_test_support anyep_objects anyep_warnings GTest::gmock_main)
    add_test(NAME ${name} COMMAND test_${name})
  endif()
endforeach()
