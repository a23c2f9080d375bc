# anyep_flags: what everything in the repository compiles with. anyep_warnings: our own code only.

add_library(anyep_flags INTERFACE)
target_compile_features(anyep_flags INTERFACE cxx_std_20)
target_include_directories(anyep_flags INTERFACE "${PROJECT_SOURCE_DIR}/include" "${PROJECT_SOURCE_DIR}/src"
                                                 "${PROJECT_BINARY_DIR}/generated")
# A fused multiply-add stands where the specification says fma and nowhere else: all variants must give equal bits.
target_compile_options(anyep_flags INTERFACE -ffp-contract=off -fvisibility=hidden -fvisibility-inlines-hidden)
target_compile_definitions(anyep_flags INTERFACE $<$<BOOL:${ANYEP_FAULTS}>:ANYEP_FAULTS=1>)

add_library(anyep_warnings INTERFACE)
target_compile_options(anyep_warnings INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wconversion
                                                $<$<BOOL:${ANYEP_WERROR}>:-Werror>)
# GCC 12 sees an overlap in "text" + std::string that is not there (GCC bug 105651).
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  target_compile_options(anyep_warnings INTERFACE -Wno-restrict)
endif()

if(ANYEP_SANITIZE STREQUAL "address")
  # In test code, AddressSanitizer sees what the three left out there would, and they double the time to compile it.
  set(sanitize -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
               $<$<BOOL:$<TARGET_PROPERTY:ANYEP_TEST_CODE>>:-fno-sanitize=null,object-size,vptr>)
elseif(ANYEP_SANITIZE STREQUAL "thread")
  set(sanitize -fsanitize=thread -fno-omit-frame-pointer)
elseif(ANYEP_SANITIZE STREQUAL "none")
  set(sanitize)
  # Distributions define _FORTIFY_SOURCE themselves, hence the -U.
  target_compile_options(anyep_flags INTERFACE
    $<$<CONFIG:Release,RelWithDebInfo>:-fstack-protector-strong;-U_FORTIFY_SOURCE;-D_FORTIFY_SOURCE=2>)
  target_link_options(anyep_flags INTERFACE -Wl,-z,relro,-z,now)
else()
  message(FATAL_ERROR "ANYEP_SANITIZE = ${ANYEP_SANITIZE}, allowed: none, address, thread")
endif()
target_compile_options(anyep_flags INTERFACE ${sanitize})
target_link_options(anyep_flags INTERFACE ${sanitize})

# Hot loops: <name>_v3.cc and <name>_v4.cc are built for those x86-64 levels and chosen at run time. On other processors they
# are left out; ANYEP_X86_LEVELS (0 or 1, always defined) tells the dispatching code.
string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" processor)
if(processor MATCHES "^(x86_64|amd64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
  set(ANYEP_X86_LEVELS 1)
else()
  set(ANYEP_X86_LEVELS 0)
endif()
target_compile_definitions(anyep_flags INTERFACE ANYEP_X86_LEVELS=${ANYEP_X86_LEVELS})

function(anyep_instruction_sets list_name)
  foreach(level 3 4)
    set(of_level ${${list_name}})
    list(FILTER of_level INCLUDE REGEX "_v${level}\\.cc$")
    if(ANYEP_X86_LEVELS)
      set_source_files_properties(${of_level} PROPERTIES COMPILE_OPTIONS "-march=x86-64-v${level}")
    elseif(of_level)
      list(REMOVE_ITEM ${list_name} ${of_level})
    endif()
  endforeach()
  set(${list_name} ${${list_name}} PARENT_SCOPE)
endfunction()
