# cmake --install: component runtime, the programs; component deploy, what runs and watches a cluster; component development, the
# library that a decode engine receives KV caches with (Headwater::kvtransfer) and its CMake package.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(hw_programs headwater headwater-coordinator headwater-worker headwater-decode headwater-bench-prefill)
install(TARGETS ${hw_programs} RUNTIME COMPONENT runtime)

# Their bill of materials: asks dpkg which packages their libraries are of, and a program for its version.
find_program(HW_DPKG_QUERY dpkg-query)
if(HW_DPKG_QUERY AND NOT HW_SANITIZE)
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  set(hw_sbom ${PROJECT_BINARY_DIR}/sbom.spdx.json)
  list(TRANSFORM hw_programs REPLACE "(.+)" "$<TARGET_FILE:\\1>" OUTPUT_VARIABLE hw_program_files)
  add_custom_command(OUTPUT ${hw_sbom}
    COMMAND Python3::Interpreter ${PROJECT_SOURCE_DIR}/tools/make_sbom.py --output ${hw_sbom}
            ${hw_program_files}
    DEPENDS ${hw_programs}
            ${PROJECT_SOURCE_DIR}/tools/make_sbom.py ${PROJECT_SOURCE_DIR}/tools/requirements.txt
    COMMENT "SBOM" VERBATIM)
  add_custom_target(sbom ALL DEPENDS ${hw_sbom})
  install(FILES ${hw_sbom} DESTINATION ${CMAKE_INSTALL_DATADIR}/headwater COMPONENT runtime)
endif()

# The root of includes is include/headwater: "kvtransfer/store.h", "headwater/v1/kv.pb.h".
set(hw_include ${CMAKE_INSTALL_INCLUDEDIR}/headwater)
set(hw_package ${CMAKE_INSTALL_LIBDIR}/cmake/Headwater)
foreach(name base rpc proto kvtransfer)
  set_target_properties(hw_${name} PROPERTIES EXPORT_NAME ${name} OUTPUT_NAME headwater_${name})
endforeach()
install(TARGETS hw_base hw_rpc hw_kvtransfer EXPORT HeadwaterTargets
  ARCHIVE COMPONENT development
  FILE_SET HEADERS DESTINATION ${hw_include} COMPONENT development)
install(TARGETS hw_proto EXPORT HeadwaterTargets
  ARCHIVE COMPONENT development
  INCLUDES DESTINATION ${hw_include})
install(DIRECTORY ${PROJECT_BINARY_DIR}/proto/gen/ DESTINATION ${hw_include} COMPONENT development
  FILES_MATCHING PATTERN "*.pb.h")
install(EXPORT HeadwaterTargets NAMESPACE Headwater:: DESTINATION ${hw_package} COMPONENT development)
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/HeadwaterConfig.cmake.in
  ${PROJECT_BINARY_DIR}/HeadwaterConfig.cmake INSTALL_DESTINATION ${hw_package})
# Before 1.0.0 a minor version may break what came before.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/HeadwaterConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/HeadwaterConfig.cmake ${PROJECT_BINARY_DIR}/HeadwaterConfigVersion.cmake
  ${PROJECT_SOURCE_DIR}/cmake/FindISAL.cmake
  DESTINATION ${hw_package} COMPONENT development)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/proto/headwater DESTINATION ${CMAKE_INSTALL_DATADIR}/headwater/proto
  COMPONENT development FILES_MATCHING PATTERN "*.proto")

install(DIRECTORY deploy/alerts deploy/dashboards deploy/kubernetes DESTINATION ${CMAKE_INSTALL_DATADIR}/headwater
  COMPONENT deploy)
install(FILES deploy/prometheus.yml deploy/roles.txtpb DESTINATION ${CMAKE_INSTALL_DATADIR}/headwater COMPONENT deploy)
install(FILES README.md SECURITY.md DESTINATION ${CMAKE_INSTALL_DOCDIR} COMPONENT runtime)
install(FILES docs/install.md docs/metrics.md docs/operations.md docs/page.md docs/runbook.md docs/sizing.md docs/upgrade.md
  DESTINATION ${CMAKE_INSTALL_DOCDIR}/docs
  COMPONENT runtime)
