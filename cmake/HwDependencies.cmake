# Packages of the service; tools/packages.txt lists them by their Debian names.
find_package(Threads REQUIRED)
find_package(absl CONFIG REQUIRED)
find_package(Protobuf REQUIRED)
find_package(gRPC CONFIG REQUIRED)
find_package(prometheus-cpp CONFIG REQUIRED)
find_package(nlohmann_json CONFIG REQUIRED)
find_package(civetweb CONFIG REQUIRED)
find_package(OpenSSL REQUIRED)
find_package(Gloo CONFIG REQUIRED)
find_package(ISAL REQUIRED)
# google/rpc/{status,error_details}.proto.
find_path(HW_GOOGLEAPIS_DIR google/rpc/error_details.proto
  PATHS /usr/share/gocode/src/github.com/gogo/googleapis /usr/share/googleapis /usr/include
  REQUIRED NO_DEFAULT_PATH)

if(TARGET hw_tsan_edges)
  target_sources(hw_tsan_edges PRIVATE cmake/tsan/absl_mutex.cc cmake/tsan/grpc.cc)
  target_link_libraries(hw_tsan_edges PUBLIC absl::synchronization gRPC::grpc++)
endif()

# Groups over GPUs. NCCL comes with CUDA's packages or on its own; the CUDA worker can be built without it.
if(HW_HAVE_CUDA)
  find_package(CUDAToolkit REQUIRED)
  find_path(HW_NCCL_INCLUDE_DIR nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
  find_library(HW_NCCL_LIBRARY nccl HINTS ${CUDAToolkit_LIBRARY_DIR} ${CUDAToolkit_LIBRARY_ROOT}/lib)
  if(HW_NCCL_INCLUDE_DIR AND HW_NCCL_LIBRARY)
    set(HW_HAVE_NCCL ON)
    add_library(hw_nccl INTERFACE IMPORTED)
    target_include_directories(hw_nccl SYSTEM INTERFACE ${HW_NCCL_INCLUDE_DIR})
    # Programs that make no groups need no NCCL where they run.
    target_link_libraries(hw_nccl INTERFACE -Wl,--push-state,--as-needed ${HW_NCCL_LIBRARY} -Wl,--pop-state)
    message(STATUS "Headwater: NCCL ${HW_NCCL_LIBRARY}")
  else()
    message(WARNING "NCCL was not found (nccl.h: ${HW_NCCL_INCLUDE_DIR}, library: ${HW_NCCL_LIBRARY}): the CUDA "
      "worker is built WITHOUT groups over several GPUs. Set HW_NCCL_INCLUDE_DIR and HW_NCCL_LIBRARY.")
  endif()
endif()
