# The CPU backend compiles every operation once for each instruction set: kernels/cpu/isa_unit.c includes the files of
# the operations and exports one table, ks_cpu_<isa>. Which table runs is chosen when a context is created.
# Files of kernels/cpu/ named here are ordinary sources; all others belong to the unit.
set(ks_cpu_plain_sources ${CMAKE_SOURCE_DIR}/kernels/cpu/cpu.c)

get_target_property(ks_kernel_sources ks_kernels SOURCES)
list(FILTER ks_kernel_sources EXCLUDE REGEX "/kernels/(cpu|cuda)/")
set_target_properties(ks_kernels PROPERTIES SOURCES "${ks_kernel_sources};${ks_cpu_plain_sources}")

set(ks_isas generic)
set(ks_isa_flags_generic "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND ks_isas avx2 avx512 avx512bf16)
  set(ks_isa_flags_avx2 -mavx2 -mfma -mf16c)
  set(ks_isa_flags_avx512 ${ks_isa_flags_avx2} -mavx512f -mavx512dq -mavx512bw -mavx512vl -mbmi2 -mprefer-vector-width=512)
  set(ks_isa_flags_avx512bf16 ${ks_isa_flags_avx512} -mavx512bf16)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(ks_isas neon)
endif()

# With sanitizers -O3 takes the compiler minutes a unit.
set(ks_isa_optimize -O3)
if(KS_SANITIZE)
  set(ks_isa_optimize -O1)
endif()

include(CheckCCompilerFlag)
foreach(isa ${ks_isas})
  string(REPLACE ";" " " CMAKE_REQUIRED_FLAGS "${ks_isa_flags_${isa}}")
  check_c_compiler_flag("" KS_COMPILER_HAS_${isa})
  unset(CMAKE_REQUIRED_FLAGS)
  if(NOT KS_COMPILER_HAS_${isa})
    message(STATUS "CPU kernels: the compiler does not know ${isa}")
    continue()
  endif()
  add_library(ks_cpu_${isa} OBJECT kernels/cpu/isa_unit.c)
  target_compile_options(ks_cpu_${isa} PRIVATE ${ks_isa_optimize} ${ks_isa_flags_${isa}})
  target_compile_definitions(ks_cpu_${isa} PRIVATE KS_ISA=${isa} KS_ISA_${isa}=1)
  target_include_directories(ks_cpu_${isa} PRIVATE ${CMAKE_SOURCE_DIR})
  target_link_libraries(ks_cpu_${isa} PRIVATE OpenMP::OpenMP_C)
  target_sources(ks_kernels PRIVATE $<TARGET_OBJECTS:ks_cpu_${isa}>)
  target_compile_definitions(ks_kernels PRIVATE KS_HAS_ISA_${isa}=1)
endforeach()

include(${CMAKE_SOURCE_DIR}/kernels/cuda/cuda.cmake)
