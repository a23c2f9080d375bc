# The anyep tool: cli/*.cc. Left out, with a message, where its two header libraries are missing.
find_package(CLI11 QUIET)
find_package(nlohmann_json QUIET)
file(GLOB cli_sources CONFIGURE_DEPENDS cli/*.cc)
if(NOT CLI11_FOUND OR NOT nlohmann_json_FOUND)
  message(STATUS "anyep tool: left out, needs CLI11 and nlohmann-json")
elseif(cli_sources)
  add_subdirectory(bench/support)
  add_executable(anyep ${cli_sources})
  target_link_libraries(anyep PRIVATE anyep_bench_support anyep_objects anyep_reference anyep_warnings CLI11::CLI11
                                      nlohmann_json::nlohmann_json)
  target_include_directories(anyep PRIVATE "${PROJECT_SOURCE_DIR}")
  install(TARGETS anyep)
endif()
