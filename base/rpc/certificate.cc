#include "base/rpc/certificate.h"

#include <cstdint>
#include <ctime>
#include <fstream>
#include <memory>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include <openssl/bio.h>
#include <openssl/bn.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include "base/status_macros.h"

namespace headwater {
namespace {

constexpr std::streamsize kMostBytes = 1 << 20;

template <auto kFree>
struct Freed {
  template <typename T>
  void operator()(T* object) const {
    kFree(object);
  }
};
using Bio = std::unique_ptr<BIO, Freed<BIO_free_all>>;
using X509Certificate = std::unique_ptr<X509, Freed<X509_free>>;
using Key = std::unique_ptr<EVP_PKEY, Freed<EVP_PKEY_free>>;
using Number = std::unique_ptr<BIGNUM, Freed<BN_free>>;
using Names = std::unique_ptr<GENERAL_NAMES, Freed<GENERAL_NAMES_free>>;

struct FreedText {
  void operator()(char* text) const { OPENSSL_free(text); }
};
using Text = std::unique_ptr<char, FreedText>;

absl::Status Wrong(const char* flag, const std::string& path, absl::string_view what) {
  ERR_clear_error();
  return absl::InvalidArgumentError(absl::StrCat("--", flag, "=", path, ": ", what));
}

absl::Status Read(const char* flag, const std::string& path, std::string* text) {
  std::ifstream file(path, std::ios::binary);
  text->resize(static_cast<size_t>(kMostBytes) + 1);
  if (!file.read(text->data(), kMostBytes + 1) && !file.eof()) return Wrong(flag, path, "it cannot be read");
  if (!file.is_open()) return Wrong(flag, path, "it cannot be read");
  if (file.gcount() > kMostBytes)
    return Wrong(flag, path, absl::StrCat("it has over ", kMostBytes, " bytes"));
  text->resize(static_cast<size_t>(file.gcount()));
  return absl::OkStatus();
}

Bio Memory(const std::string& text) {
  return Bio(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
}

// A key with a passphrase is refused: nobody is there to type it.
int NoPassphrase(char*, int, int, void*) { return -1; }

absl::Time FromAsn1(const ASN1_TIME* time) {
  std::tm broken = {};
  if (ASN1_TIME_to_tm(time, &broken) != 1) return absl::InfinitePast();
  return absl::FromTM(broken, absl::UTCTimeZone());
}

std::string OnlySpiffeId(X509* certificate) {
  const Names names(
      static_cast<GENERAL_NAMES*>(X509_get_ext_d2i(certificate, NID_subject_alt_name, nullptr, nullptr)));
  std::string found;
  for (int i = 0; names != nullptr && i < sk_GENERAL_NAME_num(names.get()); ++i) {
    const GENERAL_NAME* const name = sk_GENERAL_NAME_value(names.get(), i);
    if (name->type != GEN_URI) continue;
    if (!found.empty()) return "";
    const ASN1_IA5STRING* const uri = name->d.uniformResourceIdentifier;
    found.assign(reinterpret_cast<const char*>(ASN1_STRING_get0_data(uri)),
                 static_cast<size_t>(ASN1_STRING_length(uri)));
  }
  return absl::StartsWith(found, "spiffe://") ? found : "";
}

std::string SerialOf(X509* certificate) {
  const Number number(ASN1_INTEGER_to_BN(X509_get0_serialNumber(certificate), nullptr));
  const Text text(number == nullptr ? nullptr : BN_bn2hex(number.get()));
  return text == nullptr ? "" : text.get();
}

}  // namespace

absl::StatusOr<CertificateFiles> ReadCertificateFiles(const CertificateFiles& paths) {
  CertificateFiles texts;
  HW_RETURN_IF_ERROR(Read("tls_cert", paths.cert, &texts.cert));
  HW_RETURN_IF_ERROR(Read("tls_key", paths.key, &texts.key));
  HW_RETURN_IF_ERROR(Read("tls_ca", paths.ca, &texts.ca));
  return texts;
}

absl::StatusOr<CertificateInfo> CheckCertificate(const CertificateFiles& paths, const CertificateFiles& texts,
                                                 absl::Time now) {
  const X509Certificate certificate(PEM_read_bio_X509(Memory(texts.cert).get(), nullptr, nullptr, nullptr));
  if (certificate == nullptr) return Wrong("tls_cert", paths.cert, "it has no certificate in PEM");
  const Key private_key(PEM_read_bio_PrivateKey(Memory(texts.key).get(), nullptr, NoPassphrase, nullptr));
  if (private_key == nullptr) {
    return Wrong("tls_key", paths.key, "it has no key in PEM without a passphrase");
  }
  if (X509_check_private_key(certificate.get(), private_key.get()) != 1) {
    return Wrong("tls_key", paths.key, absl::StrCat("it is not the key of --tls_cert=", paths.cert));
  }
  const X509Certificate authority(PEM_read_bio_X509(Memory(texts.ca).get(), nullptr, nullptr, nullptr));
  if (authority == nullptr) return Wrong("tls_ca", paths.ca, "it has no certificate in PEM");
  CertificateInfo info;
  info.not_before = FromAsn1(X509_get0_notBefore(certificate.get()));
  info.not_after = FromAsn1(X509_get0_notAfter(certificate.get()));
  if (now < info.not_before || now > info.not_after) {
    return Wrong("tls_cert", paths.cert,
                 absl::StrCat("it is valid from ", absl::FormatTime(info.not_before, absl::UTCTimeZone()),
                              " to ", absl::FormatTime(info.not_after, absl::UTCTimeZone()), ", not at ",
                              absl::FormatTime(now, absl::UTCTimeZone())));
  }
  info.serial = SerialOf(certificate.get());
  info.spiffe_id = OnlySpiffeId(certificate.get());
  if (info.spiffe_id.empty()) {
    return Wrong("tls_cert", paths.cert,
                 "it has not exactly one URI name, spiffe://.../ROLE, which says who this is");
  }
  return info;
}

}  // namespace headwater
