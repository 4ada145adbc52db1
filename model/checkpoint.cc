// The files of a checkpoint directory: maps and shards.
#include <cerrno>
#include <set>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/status_macros.h"
#include "model/json.h"
#include "model/safetensors.h"

namespace headwater {
namespace {

using nlohmann::json;

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr JsonLimits kIndexLimits = {64u << 20, 4, 2 * kMaxSafetensorsTensors};

absl::Status InFile(const absl::Status& status, absl::string_view file) {
  return absl::Status(status.code(), absl::StrCat(Quoted(file), ": ", status.message()));
}

// A path would let an index read any file of the machine.
absl::Status CheckShardName(const std::string& name) {
  const bool plain = !name.empty() && name.size() <= 255 && name.front() != '.' &&
                     name.find_first_of("/\\\0", 0, 3) == std::string::npos &&
                     !absl::StrContains(name, "..") && absl::EndsWith(name, ".safetensors");
  if (plain) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(kIndexFile, ": the shard ", Quoted(name),
                                                 " must be a plain file name that ends in .safetensors"));
}

absl::StatusOr<TensorMap> OpenShard(const std::string& directory, const std::string& name,
                                    std::vector<std::unique_ptr<MappedFile>>* files) {
  HW_ASSIGN_OR_RETURN(auto file, MappedFile::Open(absl::StrCat(directory, "/", name)));
  absl::StatusOr<TensorMap> tensors = ParseSafetensors(file->data(), file->size());
  if (!tensors.ok()) return InFile(tensors.status(), name);
  files->push_back(std::move(file));
  return tensors;
}

uint64_t PageBytes() {
  static const uint64_t bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

absl::StatusOr<std::unique_ptr<MappedFile>> MappedFile::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    const int error = errno;
    return absl::ErrnoToStatus(error, absl::StrCat("open ", Quoted(path)));
  }
  const absl::Cleanup closer = [fd] { close(fd); };
  struct stat info;
  if (fstat(fd, &info) != 0) {
    const int error = errno;
    return absl::ErrnoToStatus(error, absl::StrCat("stat ", Quoted(path)));
  }
  if (!S_ISREG(info.st_mode) || info.st_size <= 0) {
    return absl::InvalidArgumentError(absl::StrCat(Quoted(path), " is empty or not a regular file"));
  }
  const size_t size = static_cast<size_t>(info.st_size);
  void* const data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    return absl::ErrnoToStatus(error, absl::StrCat("mmap ", size, " bytes of ", Quoted(path)));
  }
  return std::unique_ptr<MappedFile>(new MappedFile(static_cast<const uint8_t*>(data), size));
}

MappedFile::~MappedFile() { munmap(const_cast<uint8_t*>(data_), static_cast<size_t>(size_)); }

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& directory) {
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint);
  absl::StatusOr<TensorMap> single = OpenShard(directory, kSingleFile, &checkpoint->files_);
  if (single.ok()) {
    checkpoint->tensors_ = *std::move(single);
    return checkpoint;
  }
  if (!absl::IsNotFound(single.status())) return single.status();

  absl::StatusOr<std::string> index =
      ReadFileUpTo(absl::StrCat(directory, "/", kIndexFile), kIndexLimits.max_bytes);
  if (absl::IsNotFound(index.status())) {
    return absl::NotFoundError(
        absl::StrCat(Quoted(directory), " has neither ", kSingleFile, " nor ", kIndexFile));
  }
  HW_RETURN_IF_ERROR(index.status());
  HW_RETURN_IF_ERROR(checkpoint->AddShards(directory, *index));
  return checkpoint;
}

absl::Status Checkpoint::AddShards(const std::string& directory, absl::string_view index_text) {
  HW_ASSIGN_OR_RETURN(const json index, ParseJsonObject(index_text, kIndexLimits, kIndexFile));
  const auto weight_map = index.find("weight_map");
  if (weight_map == index.end() || !weight_map->is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(kIndexFile, ": weight_map is ",
                     weight_map == index.end() ? "absent" : Describe(*weight_map), "; must be an object"));
  }
  std::map<std::string, std::vector<std::string>> shards;
  for (const auto& [tensor, shard] : weight_map->get_ref<const json::object_t&>()) {
    if (!shard.is_string()) {
      return absl::InvalidArgumentError(absl::StrCat(kIndexFile, ": the shard of ", Quoted(tensor), " is ",
                                                     Describe(shard), "; must be a file name"));
    }
    const auto& name = shard.get_ref<const std::string&>();
    HW_RETURN_IF_ERROR(CheckShardName(name));
    shards[name].push_back(tensor);
  }
  if (shards.size() > kMaxSafetensorsShards) {
    return absl::InvalidArgumentError(
        absl::StrCat(kIndexFile, ": ", shards.size(), " shards; at most ", kMaxSafetensorsShards));
  }
  for (const auto& [shard, names] : shards) {
    HW_ASSIGN_OR_RETURN(TensorMap tensors, OpenShard(directory, shard, &files_));
    for (const std::string& name : names) {
      auto node = tensors.extract(name);
      if (node.empty()) {
        return absl::InvalidArgumentError(
            absl::StrCat(kIndexFile, ": ", Quoted(shard), " lacks the tensor ", Quoted(name)));
      }
      tensors_.insert(std::move(node));
    }
  }
  return absl::OkStatus();
}

const Tensor* Checkpoint::Find(absl::string_view name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

void PrefetchPages(const uint8_t* data, uint64_t bytes) {
  const uint64_t slack = reinterpret_cast<uintptr_t>(data) % PageBytes();
  if (bytes > 0)
    madvise(const_cast<uint8_t*>(data - slack), static_cast<size_t>(bytes + slack), MADV_WILLNEED);
}

void ReleasePages(const uint8_t* data, uint64_t bytes) {
  // Whole pages inside the range only: those at its ends belong to the neighbours too.
  const uint64_t page = PageBytes();
  const uint64_t skip = (page - reinterpret_cast<uintptr_t>(data) % page) % page;
  if (bytes < skip + page) return;
  madvise(const_cast<uint8_t*>(data + skip), static_cast<size_t>((bytes - skip) / page * page),
          MADV_DONTNEED);
}

}  // namespace headwater
