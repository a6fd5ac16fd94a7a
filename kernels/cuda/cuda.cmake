# Builds the CUDA backend into ks_kernels when a toolkit is there.
#
#   KS_CUDA=AUTO|ON|OFF   AUTO: when nvcc 12.0 or newer works here and this machine has a GPU, for that GPU alone; ON: for all
#                         architectures, and fails with the reason when nvcc does not work
#   KS_CUDA_ARCHS         "75-real;...;110" (ON: all that are supported and that the toolkit knows, and PTX of the newest; AUTO:
#                         "native"), or "native": the GPUs of this machine. CMAKE_CUDA_ARCHITECTURES is taken where it is not set
#   KS_CUDA_FLAGS         more options for nvcc: "-lineinfo" for compute-sanitizer and profilers (triples the program)
#   CUDAToolkit_ROOT, CUDACXX or CMAKE_CUDA_COMPILER say where the toolkit is
#   CUDAHOSTCXX           the C++ compiler that nvcc calls
#
# Targets: ks_cuda_archs compiles every kernel for every architecture, warnings as errors; needs no GPU.
#          ks_cuda_resources prints registers, stack, spills and shared memory of every kernel; fails when one spills that
#          kernels/cuda/spills.allow does not name.
#          ks_cuda_sass writes results/gpu/sass-sm90.md from the disassembly of this build's objects (sass.py); needs Python 3 and
#          cuobjdump (KS_CUDA_TOOLS says where, in the environment).
#
# nvcc is called by custom commands and not as a language of CMake: the objects then link with the C compiler, a build without
# toolkit configures in no time, and what ptxas says of each kernel is kept beside its object, without compiling twice.
# Nothing of the C++ runtime is used: no exceptions, no guards of local statics (nvcc's stubs have some).
# The driver and cuBLASLt are loaded at run time; the program runs on machines that have neither.

set(KS_CUDA_ARCHS "" CACHE STRING "GPU architectures, \"75-real;90\" or \"native\"; empty: all supported (AUTO: native)")
set(KS_CUDA_FLAGS "" CACHE STRING "more options for nvcc, as \"-lineinfo\"")
set(ks_cuda_all_archs 75 80 87 89 90 100 110)

# Sets ks_cuda_why to the reason when there is no usable toolkit.
macro(ks_cuda_find_toolkit)
  set(ks_cuda_why "")
  if(CMAKE_CUDA_COMPILER AND NOT CUDAToolkit_ROOT)
    get_filename_component(CUDAToolkit_ROOT "${CMAKE_CUDA_COMPILER}" DIRECTORY)
    get_filename_component(CUDAToolkit_ROOT "${CUDAToolkit_ROOT}" DIRECTORY)
  elseif(DEFINED ENV{CUDACXX} AND NOT CUDAToolkit_ROOT)
    get_filename_component(CUDAToolkit_ROOT "$ENV{CUDACXX}" DIRECTORY)
    get_filename_component(CUDAToolkit_ROOT "${CUDAToolkit_ROOT}" DIRECTORY)
  endif()
  find_package(CUDAToolkit QUIET)
  if(NOT CUDAToolkit_FOUND OR NOT CUDAToolkit_NVCC_EXECUTABLE)
    set(ks_cuda_why "there is no nvcc; install the CUDA toolkit, or say where it is: -DCUDAToolkit_ROOT=<folder>")
  elseif(CUDAToolkit_VERSION VERSION_LESS 12.0)
    set(ks_cuda_why "${CUDAToolkit_NVCC_EXECUTABLE} is version ${CUDAToolkit_VERSION}; 12.0 or newer is needed")
  elseif(NOT TARGET CUDA::cudart_static)
    set(ks_cuda_why "the toolkit of ${CUDAToolkit_NVCC_EXECUTABLE} has no libcudart_static.a; install its development files")
  else()
    set(ks_nvcc ${CUDAToolkit_NVCC_EXECUTABLE})
    if(DEFINED ENV{CUDAHOSTCXX})
      list(APPEND ks_nvcc -ccbin $ENV{CUDAHOSTCXX})
    endif()
    ks_cuda_try_nvcc()
  endif()
endmacro()

# nvcc may be there without a C++ compiler that it accepts.
macro(ks_cuda_try_nvcc)
  if(NOT KS_NVCC_WORKS STREQUAL "${ks_nvcc}")
    set(ks_try ${CMAKE_BINARY_DIR}/CMakeFiles/ks_try_nvcc)
    file(WRITE ${ks_try}.cu "__global__ void kernel(float *x) { *x = 0; }\n")
    execute_process(COMMAND ${ks_nvcc} -std=c++17 -c ${ks_try}.cu -o ${ks_try}.o RESULT_VARIABLE ks_try_status
      OUTPUT_VARIABLE ks_try_output ERROR_VARIABLE ks_try_output)
    if(ks_try_status EQUAL 0)
      set(KS_NVCC_WORKS "${ks_nvcc}" CACHE INTERNAL "")
    else()
      string(STRIP "${ks_try_output}" ks_try_output)
      set(ks_cuda_why "${CUDAToolkit_NVCC_EXECUTABLE} does not work: ${ks_try_output}")
    endif()
  endif()
endmacro()

# Capabilities of this machine's GPUs: "87" or "80;90"; empty: none. Jetsons without nvidia-smi are known by their processor.
function(ks_cuda_native_archs out)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader OUTPUT_VARIABLE caps ERROR_QUIET)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]+" caps "${caps}")
  string(REPLACE "." "" caps "${caps}")
  list(REMOVE_DUPLICATES caps)
  if(NOT caps AND EXISTS /proc/device-tree/compatible)
    file(READ /proc/device-tree/compatible compatible)
    foreach(chip tegra234=87 tegra264=110)
      string(REPLACE "=" ";" chip ${chip})
      list(GET chip 0 name)
      list(GET chip 1 cap)
      if(compatible MATCHES "${name}")
        set(caps ${cap})
      endif()
    endforeach()
  endif()
  set(${out} "${caps}" PARENT_SCOPE)
endfunction()

# All supported ones that the toolkit knows, machine code for each and PTX of the newest.
function(ks_cuda_default_archs out)
  execute_process(COMMAND ${ks_nvcc} --list-gpu-code OUTPUT_VARIABLE known ERROR_QUIET)
  set(archs "")
  foreach(arch ${ks_cuda_all_archs})
    if(known MATCHES "sm_${arch}[^0-9]")
      list(APPEND archs ${arch}-real)
    endif()
  endforeach()
  string(REGEX REPLACE "-real$" "" archs "${archs}")
  set(${out} "${archs}" PARENT_SCOPE)
endfunction()

# Kernels differ by generation only, so that one PTX serves all real architectures of a family: a third of the time saved.
set(ks_cuda_ptx_of_87 80)
set(ks_cuda_ptx_of_89 80)
set(ks_cuda_ptx_of_110 100)
function(ks_cuda_gencode out)
  set(families "")
  foreach(arch ${ARGN})
    if(NOT arch MATCHES "^([0-9]+[af]?)(-real|-virtual)?$")
      message(FATAL_ERROR "KS_CUDA_ARCHS: '${arch}' is no architecture; give a list like \"80-real;90\", or \"native\"")
    endif()
    set(cc ${CMAKE_MATCH_1})
    set(kind "${CMAKE_MATCH_2}")
    set(ptx ${cc})
    if(DEFINED ks_cuda_ptx_of_${cc})
      set(ptx ${ks_cuda_ptx_of_${cc}})
    endif()
    if(NOT kind STREQUAL "-virtual")
      set(real ${cc})
      set(family ${ptx})
      if(cc STREQUAL "90") # with its own products; such code runs on every GPU of capability 9.0
        set(real 90a)
        set(family 90a)
      endif()
      list(APPEND families ${family})
      list(APPEND codes_${family} sm_${real})
    endif()
    if(NOT kind STREQUAL "-real")
      list(APPEND families ${ptx})
      list(APPEND codes_${ptx} compute_${ptx})
    endif()
  endforeach()
  list(REMOVE_DUPLICATES families)
  foreach(ptx ${families})
    list(REMOVE_DUPLICATES codes_${ptx})
    list(JOIN codes_${ptx} "," codes)
    list(APPEND flags "-gencode=arch=compute_${ptx},code=[${codes}]")
  endforeach()
  set(${out} "${flags}" PARENT_SCOPE)
endfunction()

# Objects of all .cu in `folder` of the build, and beside each the log of ptxas.
function(ks_cuda_compile folder out_objects out_logs)
  ks_cuda_gencode(gencode ${ARGN})
  separate_arguments(flags UNIX_COMMAND "${KS_CUDA_FLAGS}")
  if(NOT CUDAToolkit_VERSION VERSION_LESS 13.0) # drivers that go with older ones may not unpack it
    list(PREPEND flags --compress-mode=size)
  endif()
  file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/${folder})
  foreach(source ${ks_cuda_cu_sources})
    get_filename_component(name ${source} NAME_WE)
    set(object ${CMAKE_BINARY_DIR}/${folder}/${name}.cu.o)
    set(log ${CMAKE_BINARY_DIR}/${folder}/${name}.ptxas.log)
    add_custom_command(OUTPUT ${object} ${log} DEPFILE ${object}.d
      COMMAND sh ${CMAKE_SOURCE_DIR}/kernels/cuda/nvcc.sh ${log} ${ks_nvcc} -std=c++17 -O3 ${flags} -Xptxas -v
        -Werror all-warnings -Xcompiler -Wall,-Wextra,-Wshadow,-fno-exceptions,-fno-threadsafe-statics,-fPIC -I${CMAKE_SOURCE_DIR} ${gencode}
        -MD -MF ${object}.d -c ${source} -o ${object}
      DEPENDS ${source} ${CMAKE_SOURCE_DIR}/kernels/cuda/nvcc.sh COMMENT "nvcc kernels/cuda/${name}.cu" VERBATIM)
    list(APPEND objects ${object})
    list(APPEND logs ${log})
  endforeach()
  set(${out_objects} ${objects} PARENT_SCOPE)
  set(${out_logs} ${logs} PARENT_SCOPE)
endfunction()

# Sets ks_cuda_archs; empty: AUTO and no GPU here.
macro(ks_cuda_choose_archs)
  ks_cuda_default_archs(ks_cuda_every)
  set(ks_cuda_archs "${KS_CUDA_ARCHS}")
  if(NOT ks_cuda_archs)
    set(ks_cuda_archs "${CMAKE_CUDA_ARCHITECTURES}")
  endif()
  if(NOT ks_cuda_archs AND KS_CUDA STREQUAL "AUTO")
    ks_cuda_native_archs(ks_cuda_archs)
  elseif(ks_cuda_archs STREQUAL "native")
    ks_cuda_native_archs(ks_cuda_archs)
    if(NOT ks_cuda_archs)
      message(FATAL_ERROR "KS_CUDA_ARCHS=native: no GPU is seen here; name the architecture, as in -DKS_CUDA_ARCHS=87")
    endif()
  elseif(NOT ks_cuda_archs)
    set(ks_cuda_archs "${ks_cuda_every}")
  endif()
endmacro()

# The targets that need no GPU.
macro(ks_cuda_add_checks)
  if(NOT DEFINED ks_cuda_every_objects)
    ks_cuda_compile(cuda_archs ks_cuda_every_objects ks_cuda_every_logs ${ks_cuda_every})
  endif()
  add_custom_target(ks_cuda_archs DEPENDS ${ks_cuda_every_objects})
  add_custom_target(ks_cuda_resources
    COMMAND sh ${CMAKE_SOURCE_DIR}/kernels/cuda/resources.sh ${CMAKE_SOURCE_DIR}/kernels/cuda/spills.allow ${ks_cuda_every_logs}
    DEPENDS ${ks_cuda_every_logs} USES_TERMINAL VERBATIM)
  if(NOT ks_cuda_objects)
    set(ks_cuda_objects ${ks_cuda_every_objects})
  endif()
  add_custom_target(ks_cuda_sass
    COMMAND python3 ${CMAKE_SOURCE_DIR}/kernels/cuda/sass.py --launches ${CMAKE_SOURCE_DIR}/kernels/cuda/launches.txt
      --out ${CMAKE_SOURCE_DIR}/results/gpu/sass-sm90.md ${ks_cuda_objects}
    DEPENDS ${ks_cuda_objects} ${CMAKE_SOURCE_DIR}/kernels/cuda/sass.py USES_TERMINAL VERBATIM)
endmacro()

macro(ks_cuda_add)
  string(REPLACE ";" " " ks_cuda_archs_text "${ks_cuda_archs}")
  message(STATUS "CUDA backend: toolkit ${CUDAToolkit_VERSION}, ${ks_cuda_archs_text}")

  ks_cuda_compile(cuda ks_cuda_objects ks_cuda_logs ${ks_cuda_archs})
  if(ks_cuda_archs STREQUAL ks_cuda_every)
    set(ks_cuda_every_objects ${ks_cuda_objects})
    set(ks_cuda_every_logs ${ks_cuda_logs})
  endif()

  target_sources(ks_kernels PRIVATE ${ks_cuda_c_sources} ${ks_cuda_objects})
  set_source_files_properties(${ks_cuda_objects} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
  set_source_files_properties(${CMAKE_SOURCE_DIR}/kernels/backend.c PROPERTIES COMPILE_DEFINITIONS KS_HAS_CUDA=1)
  set(ks_cuda_definitions "KS_CUDA_ARCHS=\"${ks_cuda_archs_text}\"")
  if(ks_cuda_archs MATCHES "(^|;)90a?(-real)?(;|$)")
    list(APPEND ks_cuda_definitions KS_CUDA_HAS_SM_90A=1)
  endif()
  find_path(KS_CUBLASLT_INCLUDE cublasLt.h HINTS ${CUDAToolkit_INCLUDE_DIRS} NO_DEFAULT_PATH)
  if(KS_CUBLASLT_INCLUDE)
    list(APPEND ks_cuda_definitions KS_CUDA_HAS_CUBLASLT=1)
  else()
    message(STATUS "CUDA backend: no cublasLt.h; products use this project's kernels only")
  endif()
  set_source_files_properties(${ks_cuda_c_sources} PROPERTIES COMPILE_DEFINITIONS "${ks_cuda_definitions}"
    COMPILE_OPTIONS "-isystem;${CUDAToolkit_INCLUDE_DIRS}")
  target_link_libraries(ks_kernels PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS})
endmacro()

if(NOT KS_CUDA STREQUAL "OFF")
  ks_cuda_find_toolkit()
  if(NOT ks_cuda_why)
    file(GLOB ks_cuda_cu_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/kernels/cuda/*.cu)
    file(GLOB ks_cuda_c_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/kernels/cuda/*.c)
    ks_cuda_choose_archs()
    if(ks_cuda_archs)
      ks_cuda_add()
    else()
      message(STATUS "CUDA backend: none: KS_CUDA=AUTO and no GPU here; KS_CUDA=ON builds it for all")
    endif()
    ks_cuda_add_checks()
  elseif(KS_CUDA STREQUAL "ON")
    message(FATAL_ERROR "KS_CUDA=ON: ${ks_cuda_why}")
  else()
    message(STATUS "CUDA backend: none: ${ks_cuda_why}")
  endif()
endif()
