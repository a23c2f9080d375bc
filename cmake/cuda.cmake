# The CUDA backend. ANYEP_CUDA = AUTO (where nvcc is found), ON or OFF; everything of the library sees ANYEP_CUDA = 1 or 0.
#
#   anyep_cuda_runtime   what the code needs beside itself: the static CUDA runtime. Nothing links a driver: libanyep loads on
#                        a machine without one
#   anyep_cuda_kernels   src/cuda/**/*.cu, one object each for all architectures
#
# CMake's own CUDA language is not used: 3.25 hands no -std=c++20 to nvcc, and a static library would ask its users for it.
set(ANYEP_CUDA AUTO CACHE STRING "Build the CUDA backend: AUTO (where nvcc is found), ON or OFF")
set_property(CACHE ANYEP_CUDA PROPERTY STRINGS AUTO ON OFF)
set(ANYEP_CUDA_ARCHS "80;86;89;90a;100;120" CACHE STRING "GPU architectures, machine code each; nothing is compiled at run time")
set(ANYEP_CUDA_FLAGS "" CACHE STRING "More flags for nvcc, a list")
if(NOT ANYEP_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "ANYEP_CUDA = ${ANYEP_CUDA}, allowed: AUTO, ON, OFF")
endif()

set(anyep_cuda 0)
if(NOT ANYEP_CUDA STREQUAL "OFF")
  find_package(CUDAToolkit 12.8 QUIET)
  if(CUDAToolkit_NVCC_EXECUTABLE AND TARGET CUDA::cudart_static)
    set(anyep_cuda 1)
  elseif(ANYEP_CUDA STREQUAL "ON")
    message(FATAL_ERROR "ANYEP_CUDA = ON needs nvcc and the static CUDA runtime, 12.8 or later (found: ${CUDAToolkit_VERSION}). "
                        "Set CUDAToolkit_ROOT, or build for CPU ranks with -DANYEP_CUDA=OFF")
  else()
    message(STATUS "CUDA backend: left out, needs nvcc and the static CUDA runtime, 12.8 or later")
  endif()
endif()
target_compile_definitions(anyep_flags INTERFACE ANYEP_CUDA=${anyep_cuda})
if(NOT anyep_cuda)
  return()
endif()

add_library(anyep_cuda_runtime INTERFACE)
target_link_libraries(anyep_cuda_runtime INTERFACE CUDA::cudart_static)
# A process may hold other CUDA runtimes (torch's): each must keep to its own.
target_link_options(anyep_cuda_runtime INTERFACE -Wl,--exclude-libs,libcudart_static.a:libculibos.a)

set(anyep_nvcc_flags -std=c++20 -O3 -fmad=false -ccbin "${CMAKE_CXX_COMPILER}"
    -Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-ffp-contract=off,-Wall,-Wextra
    "-I${PROJECT_SOURCE_DIR}/include" "-I${PROJECT_SOURCE_DIR}/src"
    -DANYEP_CUDA=1 "-DANYEP_X86_LEVELS=${ANYEP_X86_LEVELS}")
foreach(arch ${ANYEP_CUDA_ARCHS})
  if(NOT arch MATCHES "^[0-9]+[af]?$")
    message(FATAL_ERROR "ANYEP_CUDA_ARCHS = ${ANYEP_CUDA_ARCHS}, allowed: a list like 80;90a")
  endif()
  list(APPEND anyep_nvcc_flags "-gencode=arch=compute_${arch},code=sm_${arch}")
endforeach()
if(ANYEP_WERROR)
  list(APPEND anyep_nvcc_flags -Werror=all-warnings -Xcompiler=-Werror)
endif()
if(CMAKE_BUILD_TYPE MATCHES "Debug|RelWithDebInfo")
  list(APPEND anyep_nvcc_flags -g -lineinfo)
else()
  list(APPEND anyep_nvcc_flags -DNDEBUG)
endif()
list(APPEND anyep_nvcc_flags ${ANYEP_CUDA_FLAGS})

set(anyep_nvcc ${CMAKE_CXX_COMPILER_LAUNCHER} "${CUDAToolkit_NVCC_EXECUTABLE}")
if(CMAKE_CXX_COMPILER_LAUNCHER MATCHES "ccache")
  # ccache would look at the preprocessed text of one architecture only; what the compiler read says it for all.
  list(PREPEND anyep_nvcc "${CMAKE_COMMAND}" -E env CCACHE_DEPEND=1)
endif()

string(REPLACE ";" "," architectures "${ANYEP_CUDA_ARCHS}")
set_source_files_properties(src/cuda/runtime/architectures.cc PROPERTIES
                            COMPILE_DEFINITIONS "ANYEP_CUDA_ARCHS=\"${architectures}\"")

# Compiles one .cu file; its object's path goes into `result`. Two targets may list it only if one depends on the other.
function(anyep_cuda_object unit result)
  set(object "${PROJECT_BINARY_DIR}/cuda/${unit}.o")
  cmake_path(GET object PARENT_PATH folder)
  file(MAKE_DIRECTORY "${folder}")
  add_custom_command(
    OUTPUT "${object}"
    COMMAND ${anyep_nvcc} ${anyep_nvcc_flags} -MD -MF "${object}.d" -MT "${object}"
            -c "${PROJECT_SOURCE_DIR}/${unit}" -o "${object}"
    DEPENDS "${PROJECT_SOURCE_DIR}/${unit}" DEPFILE "${object}.d" COMMENT "Building CUDA object ${unit}" VERBATIM)
  set(${result} "${object}" PARENT_SCOPE)
endfunction()

file(GLOB_RECURSE anyep_cuda_units RELATIVE "${PROJECT_SOURCE_DIR}" CONFIGURE_DEPENDS src/cuda/*.cu)
set(ANYEP_CUDA_OBJECTS)
foreach(unit ${anyep_cuda_units})
  anyep_cuda_object("${unit}" object)
  list(APPEND ANYEP_CUDA_OBJECTS "${object}")
endforeach()

if(ANYEP_CUDA_OBJECTS)
  add_library(anyep_cuda_kernels STATIC ${ANYEP_CUDA_OBJECTS})
  set_target_properties(anyep_cuda_kernels PROPERTIES LINKER_LANGUAGE CXX)
  target_link_libraries(anyep_cuda_runtime INTERFACE anyep_cuda_kernels)
endif()

# The installed library holds the kernels itself. A shared one needs nothing of CUDA to link; whoever links a static one needs the
# toolkit's static runtime (AnyEPConfig.cmake and anyep.pc ask for it).
function(anyep_put_cuda_into library)
  target_sources(${library} PRIVATE ${ANYEP_CUDA_OBJECTS})
  target_link_libraries(${library} PRIVATE CUDA::cudart_static)
  target_link_options(${library} PRIVATE -Wl,--exclude-libs,libcudart_static.a:libculibos.a)
  if(TARGET anyep_cuda_kernels)
    add_dependencies(${library} anyep_cuda_kernels)  # else two targets would make the same objects at once
  endif()
endfunction()
