# anyep._native, the nanobind extension, and what a wheel holds. A wheel build (scikit-build-core) installs the native parts
# and, unless ANYEP_DEEP_EP is off, the deep_ep packages; scikit-build-core itself takes python/anyep's .py files.
find_package(Python 3.9 REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(COMMAND "${Python_EXECUTABLE}" -m nanobind --cmake_dir OUTPUT_STRIP_TRAILING_WHITESPACE
                OUTPUT_VARIABLE nanobind_ROOT RESULT_VARIABLE nanobind_missing ERROR_QUIET)
if(nanobind_missing)
  message(FATAL_ERROR "anyep._native needs nanobind: ${Python_EXECUTABLE} -m pip install nanobind")
endif()
find_package(nanobind CONFIG REQUIRED)

file(GLOB native_sources CONFIGURE_DEPENDS python/anyep/native/*.cc)
nanobind_add_module(anyep_native NB_STATIC NB_SUPPRESS_WARNINGS NOMINSIZE PROTECT_STACK ${native_sources})
# Static: a wheel carries no second library.
target_link_libraries(anyep_native PRIVATE anyep_objects anyep_flags anyep_warnings fmt::fmt Threads::Threads)
set_target_properties(anyep_native PROPERTIES OUTPUT_NAME _native)

if(SKBUILD)
  install(TARGETS anyep_native LIBRARY DESTINATION anyep COMPONENT python)
  nanobind_add_stub(anyep_native_stub MODULE _native OUTPUT _native.pyi PYTHON_PATH $<TARGET_FILE_DIR:anyep_native>
                    DEPENDS anyep_native)
  install(FILES "${CMAKE_CURRENT_BINARY_DIR}/_native.pyi" DESTINATION anyep COMPONENT python)
  if(TARGET anyep)
    install(TARGETS anyep RUNTIME DESTINATION anyep/bin COMPONENT python)
  endif()
  if(ANYEP_DEEP_EP)
    install(DIRECTORY python/deep_ep python/deep_ep_cpp DESTINATION . COMPONENT python PATTERN __pycache__ EXCLUDE)
  endif()
else()
  # A package beside the build: the .py files are links, so that an edit needs no build.
  set(package "${CMAKE_BINARY_DIR}/python")
  set_target_properties(anyep_native PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${package}/anyep")
  file(MAKE_DIRECTORY "${package}/anyep")
  file(GLOB parts CONFIGURE_DEPENDS python/anyep/*.py python/anyep/py.typed python/anyep/torch)
  foreach(part ${parts})
    cmake_path(GET part FILENAME name)
    file(CREATE_LINK "${part}" "${package}/anyep/${name}" SYMBOLIC)
  endforeach()
  foreach(name deep_ep deep_ep_cpp)
    file(CREATE_LINK "${PROJECT_SOURCE_DIR}/python/${name}" "${package}/${name}" SYMBOLIC)
  endforeach()
endif()
