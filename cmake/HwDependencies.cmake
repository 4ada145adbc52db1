# Packages of the service; tools/packages.txt lists them by their Debian names.
find_package(Threads REQUIRED)
find_package(absl CONFIG REQUIRED)
find_package(Protobuf REQUIRED)
find_package(gRPC CONFIG REQUIRED)
find_package(prometheus-cpp CONFIG REQUIRED)
find_package(nlohmann_json CONFIG REQUIRED)
find_package(OpenSSL REQUIRED)
find_package(Gloo CONFIG REQUIRED)
find_library(HW_ISAL_LIBRARY isal REQUIRED)
# google/rpc/{status,error_details}.proto.
find_path(HW_GOOGLEAPIS_DIR google/rpc/error_details.proto
  PATHS /usr/share/gocode/src/github.com/gogo/googleapis /usr/share/googleapis /usr/include
  REQUIRED NO_DEFAULT_PATH)

if(TARGET hw_tsan_edges)
  target_sources(hw_tsan_edges PRIVATE cmake/tsan/absl_mutex.cc cmake/tsan/grpc.cc)
  target_link_libraries(hw_tsan_edges PUBLIC absl::synchronization gRPC::grpc++)
endif()
