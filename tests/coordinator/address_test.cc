#include "coordinator/address.h"

#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "coordinator/registration.h"
#include "tests/coordinator/fakes.h"

namespace headwater::testing {
namespace {

constexpr bool kTaken = true, kRefused = false;

TEST(AddressTest, WithoutRangesAnyPlainNameAndAnyUsualAddressIsTaken) {
  const std::pair<std::string, bool> cases[] = {
      {"10.1.2.3:7080", kTaken},
      {"127.0.0.1:1", kTaken},
      {"[::1]:65535", kTaken},
      {"[fd00::7]:7080", kTaken},
      {"localhost:7080", kTaken},
      {"decode-0.headwater.svc:7080", kTaken},
      {"decode_0:7080", kTaken},
      {"10.in-addr.example:7080", kTaken},
      {std::string(255, 'a') + ":7080", kTaken},
      {std::string(256, 'a') + ":7080", kRefused},
      // No host or no port.
      {"", kRefused},
      {":7080", kRefused},
      {"[]:7080", kRefused},
      {"decode", kRefused},
      {"decode:", kRefused},
      {"decode:0", kRefused},
      {"decode:65536", kRefused},
      {"decode:+80", kRefused},
      {"decode: 80", kRefused},
      {"decode:80 ", kRefused},
      {"decode:00080808080", kRefused},
      {"decode:http", kRefused},
      // What gRPC would take as more than a host.
      {"unix:/var/run/docker.sock:80", kRefused},
      {"unix-abstract:name:80", kRefused},
      {"dns:decode:80", kRefused},
      {"dns://8.8.8.8/decode:80", kRefused},
      {"ipv4:169.254.169.254:80", kRefused},
      {"ipv6:[::1]:80", kRefused},
      {"xds:///decode:80", kRefused},
      {"vsock:2:80", kRefused},
      {"http://decode:80", kRefused},
      {"user@decode:80", kRefused},
      {"decode/../x:80", kRefused},
      {"decode%00:80", kRefused},
      {std::string("decode\0:80", 10), kRefused},
      {"decode\n:80", kRefused},
      {"a,b:80", kRefused},
      // IPv6 without brackets, half in them, or with a zone.
      {"::1:7080", kRefused},
      {"[::1:7080", kRefused},
      {"::1]:7080", kRefused},
      {"[[::1]]:7080", kRefused},
      {"[127.0.0.1:7080", kRefused},
      {"[decode]:7080", kRefused},
      {"[127.0.0.1]:7080", kRefused},
      {"[2852039166]:80", kRefused},
      {"[fe80::1%eth0]:7080", kRefused},
      // Wildcards, link-local addresses and those of many; the metadata service's in its spellings.
      {"0.0.0.0:7080", kRefused},
      {"0.1.2.3:7080", kRefused},
      {"[::]:7080", kRefused},
      {"169.254.169.254:80", kRefused},
      {"169.254.0.1:80", kRefused},
      {"169.255.0.1:80", kTaken},
      {"169.254.43518:80", kRefused},
      {"169.16689662:80", kRefused},
      {"2852039166:80", kRefused},
      {"0xa9fea9fe:80", kRefused},
      {"0xA9.0xFE.0xA9.0xFE:80", kRefused},
      {"0251.0376.0251.0376:80", kRefused},
      {"127.1:80", kRefused},
      {"[::ffff:169.254.169.254]:80", kRefused},
      {"[::ffff:a9fe:a9fe]:80", kRefused},
      {"[fe80::1]:80", kRefused},
      {"[febf::1]:80", kRefused},
      {"[fec0::1]:80", kTaken},
      {"224.0.0.1:80", kRefused},
      {"239.255.255.255:80", kRefused},
      {"255.255.255.255:80", kRefused},
      {"[ff02::1]:80", kRefused},
  };
  for (const auto& [text, taken] : cases) {
    EXPECT_EQ(CheckPeerAddress(text, {}).ok(), taken) << text;
    for (const bool kv : {false, true}) {
      v1::DecodeRegistration registration = MakeDecodeNode("d");
      (kv ? registration.mutable_kv_address() : registration.mutable_decode_address())->assign(text);
      const absl::Status status = CheckRegistration(registration);
      EXPECT_EQ(status.ok(), taken) << text << ": " << status;
      EXPECT_EQ(ReasonOf(status), taken ? v1::ERROR_REASON_UNSPECIFIED : v1::ERROR_REASON_BAD_FIELD) << text;
    }
    v1::WorkerRegistration worker = MakeWorker("w");
    worker.set_rendezvous_address(text);
    EXPECT_EQ(CheckRegistration(worker).ok(), taken) << text;
  }
}

TEST(AddressTest, WithRangesOnlyAnAddressInOneOfThemIsTaken) {
  const auto ranges = ParseAddressRanges("10.0.0.0/8,192.168.4.0/23,fd00:1::/32,127.0.0.1/32");
  ASSERT_TRUE(ranges.ok()) << ranges.status();
  const std::pair<const char*, bool> cases[] = {
      {"10.0.0.0:1", kTaken},          {"10.255.255.255:1", kTaken},  {"11.0.0.0:1", kRefused},
      {"9.255.255.255:1", kRefused},   {"192.168.4.0:1", kTaken},     {"192.168.5.255:1", kTaken},
      {"192.168.6.0:1", kRefused},     {"192.168.3.255:1", kRefused}, {"127.0.0.1:1", kTaken},
      {"127.0.0.2:1", kRefused},       {"[fd00:1::9]:1", kTaken},     {"[fd00:2::9]:1", kRefused},
      {"[::ffff:10.1.1.1]:1", kTaken}, {"[::1]:1", kRefused},         {"localhost:1", kRefused},
      {"decode-0.svc:1", kRefused},    {"169.254.1.1:1", kRefused},   {"[::10.1.1.1]:1", kRefused},
  };
  for (const auto& [text, taken] : cases) {
    EXPECT_EQ(CheckPeerAddress(text, *ranges).ok(), taken) << text;
    v1::DecodeRegistration registration = MakeDecodeNode("d");
    registration.set_decode_address("10.0.0.1:1");
    registration.set_kv_address(text);
    EXPECT_EQ(CheckRegistration(registration, *ranges).ok(), taken) << text;
    registration.set_kv_address("10.0.0.1:1");
    registration.set_decode_address(text);
    EXPECT_EQ(CheckRegistration(registration, *ranges).ok(), taken) << text;
  }
  const auto all = ParseAddressRanges("0.0.0.0/0,::/0");
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_TRUE(CheckPeerAddress("8.8.8.8:1", *all).ok());
  EXPECT_FALSE(CheckPeerAddress("169.254.169.254:80", *all).ok()) << "no range allows link-local addresses";
}

TEST(AddressTest, RangesThatAreNoneAreRefused) {
  EXPECT_TRUE(ParseAddressRanges("")->empty());
  for (const char* text : {"10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/-1", "fd00::/129", "10.0.0/8",
                           "host/8", "10.0.0.0/8,", ",10.0.0.0/8", "10.0.0.0/8/8", "10.0.0.0/8 fd00::/8"}) {
    const absl::Status status = ParseAddressRanges(text).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_TRUE(absl::StrContains(status.message(), "no range of addresses")) << status;
  }
  for (const char* text : {"10.0.0.1/8", "fd00::1/8", "1.2.3.5/31", "0.0.0.1/0"}) {
    EXPECT_TRUE(absl::StrContains(ParseAddressRanges(text).status().message(), "bits beyond")) << text;
  }
}

}  // namespace
}  // namespace headwater::testing
