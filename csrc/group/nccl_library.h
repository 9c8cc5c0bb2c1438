// NCCL, found at run time.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "device/cuda_runtime.h"
#include "device/dynamic_library.h"
#include "group/nccl_api.h"

namespace pyar {

class NcclLibrary {
 public:
  // 2.18 (2023): communicators that do not block while they are made, and can be split. Every torch
  // that we support brings a later one.
  static constexpr int kOldestVersion = 21800;

  // `path`: value of PYALLREDUCE_NCCL, or empty. `folders`: of the installed packages. Cheap when
  // it has been loaded before; lives as long as the process. Error that says where it was sought,
  // or why it cannot be used, and what to install.
  static const NcclLibrary& load(const std::string& path,
                                 const std::vector<std::string>& folders = {});

  NcclLibrary(const NcclLibrary&) = delete;
  NcclLibrary& operator=(const NcclLibrary&) = delete;

  int version() const { return version_; }  // 23007 is 2.30.7
  static std::string name_of(int version);  // "2.30.7"
  const DynamicLibrary& library() const { return library_; }
  // Functions that this one lacks, and that we can do without.
  const std::vector<std::string>& missing() const { return missing_; }
  // Of a status that did not come from one of the functions below themselves.
  Error error(const std::string& what, int status) const;

  ForeignFunction<NcclUniqueId*> get_unique_id{"ncclGetUniqueId"};
  ForeignFunction<NcclComm*, int, NcclUniqueId, int, NcclConfig*> comm_init{
      "ncclCommInitRankConfig"};
  ForeignFunction<NcclComm> comm_abort{"ncclCommAbort"};
  ForeignFunction<NcclComm, int*> comm_get_async_error{"ncclCommGetAsyncError"};
  // input, output, count, dtype, op, comm, stream; count of the output in reduce_scatter, of the
  // input in all_gather.
  ForeignFunction<const void*, void*, size_t, int, int, NcclComm, CudaStream> all_reduce{
      "ncclAllReduce"};
  ForeignFunction<const void*, void*, size_t, int, int, NcclComm, CudaStream> reduce_scatter{
      "ncclReduceScatter"};
  ForeignFunction<const void*, void*, size_t, int, NcclComm, CudaStream> all_gather{
      "ncclAllGather"};
  ForeignFunction<const void*, void*, size_t, int, int, NcclComm, CudaStream> broadcast{
      "ncclBroadcast"};

  // Optional: look before the call.
  ForeignFunction<NcclComm, int, int, NcclComm*, NcclConfig*> comm_split{"ncclCommSplit"};
  ForeignFunction<void**, size_t> mem_alloc{"ncclMemAlloc"};
  ForeignFunction<void*> mem_free{"ncclMemFree"};
  ForeignFunction<NcclComm, void*, size_t, void**> comm_register{"ncclCommRegister"};
  ForeignFunction<NcclComm, void*> comm_deregister{"ncclCommDeregister"};

 private:
  NcclLibrary(const std::string& path, const std::vector<std::string>& folders);

  void find_required();
  void find_optional();
  Error unusable(const std::string& why) const;
  // What NCCL has to say about its latest failure; may be empty.
  std::string last_error() const;
  static std::string explain(const void* library, int status);

  DynamicLibrary library_;
  int version_ = 0;
  std::vector<std::string> missing_;
  const char* (*get_error_string_)(int) = nullptr;
  const char* (*get_last_error_)(NcclComm) = nullptr;
};

}  // namespace pyar
