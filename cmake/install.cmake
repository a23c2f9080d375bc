# Install rules: library, headers, find_package(AnyEP), pkg-config.
include(CMakePackageConfigHelpers)

set(package_folder "${CMAKE_INSTALL_LIBDIR}/cmake/AnyEP")
install(TARGETS anyep_lib EXPORT AnyEPTargets)
install(DIRECTORY include/anyep DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" FILES_MATCHING PATTERN "*.h")
install(EXPORT AnyEPTargets NAMESPACE AnyEP:: DESTINATION "${package_folder}")

configure_package_config_file(cmake/AnyEPConfig.cmake.in AnyEPConfig.cmake INSTALL_DESTINATION "${package_folder}")
write_basic_package_version_file(AnyEPConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/AnyEPConfig.cmake" "${PROJECT_BINARY_DIR}/AnyEPConfigVersion.cmake"
        DESTINATION "${package_folder}")

# The prefix is found from where the .pc file lies, so that an installed tree can be moved.
cmake_path(RELATIVE_PATH CMAKE_INSTALL_PREFIX BASE_DIRECTORY
           "${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_LIBDIR}/pkgconfig" OUTPUT_VARIABLE pc_to_prefix)
if(BUILD_SHARED_LIBS)
  set(pc_private_word ".private")
else()
  set(pc_private_word "")
endif()
set(pc_cuda "")
if(anyep_cuda)
  set(pc_cuda " -L${CUDAToolkit_LIBRARY_DIR} -lcudart_static -ldl -lrt")
endif()
configure_file(cmake/anyep.pc.in anyep.pc @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/anyep.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
