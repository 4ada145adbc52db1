#include "tests/support/certificates.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>

#include "base/log.h"

namespace headwater::testing {
namespace {

template <typename Write>
std::string ToPem(Write write) {
  BIO* const memory = BIO_new(BIO_s_mem());
  HW_CHECK(write(memory) == 1);
  char* data = nullptr;
  const long size = BIO_get_mem_data(memory, &data);
  std::string text(data, static_cast<size_t>(size));
  BIO_free(memory);
  return text;
}

void AddExtension(X509* certificate, X509* issuer, int id, const std::string& value) {
  X509V3_CTX context;
  X509V3_set_ctx_nodb(&context);
  X509V3_set_ctx(&context, issuer, certificate, nullptr, nullptr, 0);
  X509_EXTENSION* const extension = X509V3_EXT_conf_nid(nullptr, &context, id, value.c_str());
  HW_CHECK(extension != nullptr);
  HW_CHECK(X509_add_ext(certificate, extension, -1) == 1);
  X509_EXTENSION_free(extension);
}

X509* NewCertificate(EVP_PKEY* key, const std::string& name, absl::Time not_before, absl::Time not_after) {
  X509* const certificate = X509_new();
  X509_set_version(certificate, 2);
  unsigned char serial[8];
  HW_CHECK(RAND_bytes(serial, sizeof serial) == 1);
  serial[0] &= 0x7f;
  BIGNUM* const number = BN_bin2bn(serial, sizeof serial, nullptr);
  BN_to_ASN1_INTEGER(number, X509_get_serialNumber(certificate));
  BN_free(number);
  ASN1_TIME_set(X509_getm_notBefore(certificate), absl::ToTimeT(not_before));
  ASN1_TIME_set(X509_getm_notAfter(certificate), absl::ToTimeT(not_after));
  X509_set_pubkey(certificate, key);
  X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate), "CN", MBSTRING_ASC,
                             reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
  return certificate;
}

void WriteFile(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  ASSERT_TRUE(file.flush()) << path;
}

}  // namespace

struct CertificateAuthority::Keys {
  EVP_PKEY* key = nullptr;
  X509* certificate = nullptr;
  ~Keys() {
    X509_free(certificate);
    EVP_PKEY_free(key);
  }
};

CertificateAuthority::CertificateAuthority(const std::string& name) : keys_(std::make_unique<Keys>()) {
  keys_->key = EVP_EC_gen("P-256");
  X509* const own = keys_->certificate =
      NewCertificate(keys_->key, name, absl::Now() - absl::Hours(1), absl::Now() + absl::Hours(24));
  X509_set_issuer_name(own, X509_get_subject_name(own));
  AddExtension(own, own, NID_basic_constraints, "critical,CA:TRUE");
  AddExtension(own, own, NID_key_usage, "critical,keyCertSign,cRLSign");
  HW_CHECK(X509_sign(own, keys_->key, EVP_sha256()) > 0);
  pem_ = ToPem([own](BIO* to) { return PEM_write_bio_X509(to, own); });
}

CertificateAuthority::~CertificateAuthority() = default;

Issued CertificateAuthority::Issue(const std::vector<std::string>& uris, absl::Time not_before,
                                   absl::Time not_after) const {
  EVP_PKEY* const key = EVP_EC_gen("P-256");
  X509* const certificate = NewCertificate(key, "a process", not_before, not_after);
  X509_set_issuer_name(certificate, X509_get_subject_name(keys_->certificate));
  AddExtension(certificate, keys_->certificate, NID_basic_constraints, "critical,CA:FALSE");
  AddExtension(certificate, keys_->certificate, NID_ext_key_usage, "serverAuth,clientAuth");
  std::string names = "IP:127.0.0.1,DNS:localhost";
  for (const std::string& uri : uris) absl::StrAppend(&names, ",URI:", uri);
  AddExtension(certificate, keys_->certificate, NID_subject_alt_name, names);
  HW_CHECK(X509_sign(certificate, keys_->key, EVP_sha256()) > 0);
  Issued issued;
  issued.cert = ToPem([&](BIO* to) { return PEM_write_bio_X509(to, certificate); });
  issued.key = ToPem(
      [&](BIO* to) { return PEM_write_bio_PrivateKey(to, key, nullptr, nullptr, 0, nullptr, nullptr); });
  X509_free(certificate);
  EVP_PKEY_free(key);
  return issued;
}

std::string SpiffeId(const std::string& role) {
  return absl::StrCat("spiffe://test.example/ns/headwater/", role);
}

IdentityFiles::IdentityFiles(const CertificateAuthority& authority, const std::string& role) {
  std::string pattern = ::testing::TempDir() + "identity.XXXXXX";
  HW_CHECK(mkdtemp(pattern.data()) != nullptr);
  directory_ = pattern;
  Rewrite(authority.Issue({SpiffeId(role)}), authority.pem());
}

IdentityFiles::~IdentityFiles() {
  std::error_code error;
  std::filesystem::remove_all(directory_, error);
}

void IdentityFiles::Rewrite(const Issued& issued, const std::string& ca) {
  const std::string name = absl::StrCat("v", ++version_), to = absl::StrCat(directory_, "/", name);
  std::filesystem::create_directory(to);
  WriteFile(to + "/tls.crt", issued.cert);
  WriteFile(to + "/tls.key", issued.key);
  WriteFile(to + "/ca.crt", ca);
  std::filesystem::create_symlink(name, directory_ + "/new");
  std::filesystem::rename(directory_ + "/new", directory_ + "/now");
}

TransportOptions IdentityFiles::options() const {
  TransportOptions options;
  options.cert = directory_ + "/now/tls.crt";
  options.key = directory_ + "/now/tls.key";
  options.ca = directory_ + "/now/ca.crt";
  options.refresh = absl::Seconds(1);
  return options;
}

}  // namespace headwater::testing
