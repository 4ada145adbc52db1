# cpack -G DEB: Debian packages, one for each component of cmake/HwInstall.cmake. dpkg-shlibdeps finds what programs load, therefore
# builds with CUDA, whose libraries are no Debian packages, cannot be packed.
set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME headwater)
set(CPACK_PACKAGE_VENDOR "Headwater maintainers")
set(CPACK_PACKAGE_CONTACT "Headwater maintainers <maintainers@headwater.invalid>")
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
set(CPACK_STRIP_FILES ON)
set(CPACK_COMPONENTS_ALL runtime deploy development)
set(CPACK_INSTALL_DEFAULT_DIRECTORY_PERMISSIONS
  OWNER_READ OWNER_WRITE OWNER_EXECUTE GROUP_READ GROUP_EXECUTE WORLD_READ WORLD_EXECUTE)
set(CPACK_DEB_COMPONENT_INSTALL ON)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)

set(CPACK_DEBIAN_RUNTIME_PACKAGE_NAME headwater)
set(CPACK_DEBIAN_RUNTIME_PACKAGE_SECTION net)
set(CPACK_DEBIAN_RUNTIME_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_RUNTIME_PACKAGE_SUGGESTS "headwater-deploy")
set(CPACK_DEBIAN_RUNTIME_DESCRIPTION "prefill service for language models: programs
Coordinator, workers and a reference decode node of a prefill tier, which
runs the prefill of long prompts on several workers at once and streams the
finished KV cache to decode nodes; and headwater, its command line.
These programs compute on CPUs.")

set(CPACK_DEBIAN_DEPLOY_PACKAGE_NAME headwater-deploy)
set(CPACK_DEBIAN_DEPLOY_PACKAGE_SECTION admin)
set(CPACK_DEBIAN_DEPLOY_PACKAGE_ARCHITECTURE all)
set(CPACK_DEBIAN_DEPLOY_PACKAGE_SUGGESTS "prometheus")
set(CPACK_DEBIAN_DEPLOY_DESCRIPTION "prefill service for language models: what runs and watches it
Alert and recording rules for Prometheus, boards for Grafana, manifests for
Kubernetes by Kustomize, and the roles that mutual TLS is used with.")

set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_NAME libheadwater-dev)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_DEPENDS
  "libabsl-dev, libcivetweb-dev, libgrpc++-dev, libisal-dev, libprotobuf-dev, libssl-dev, prometheus-cpp-dev, protobuf-compiler-grpc")
set(CPACK_DEBIAN_DEVELOPMENT_DESCRIPTION "prefill service for language models: receiving KV caches
The library with which a decode engine receives KV caches, and a sender:
headers, a static library, a CMake package (Headwater::kvtransfer) and the
protocol's files for protoc.")

# Debian wants both in each package.
set(hw_changelog ${PROJECT_BINARY_DIR}/changelog.gz)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/deploy/packages/changelog)
execute_process(COMMAND gzip -9n INPUT_FILE ${PROJECT_SOURCE_DIR}/deploy/packages/changelog OUTPUT_FILE ${hw_changelog}
  COMMAND_ERROR_IS_FATAL ANY)
foreach(component IN LISTS CPACK_COMPONENTS_ALL)
  string(TOUPPER ${component} hw_component)
  install(FILES ${hw_changelog} ${PROJECT_SOURCE_DIR}/deploy/packages/copyright
    DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/${CPACK_DEBIAN_${hw_component}_PACKAGE_NAME} COMPONENT ${component})
endforeach()

include(CPack)
