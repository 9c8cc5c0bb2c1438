// The environment as a documented struct, read in one place.
#pragma once

#include <string>

namespace pyar {

struct Env {
  // PYALLREDUCE_ISA: instruction set of the CPU kernels (baseline, avx2, avx512). Default: the
  // widest this CPU has.
  std::string isa;
  // PYALLREDUCE_CUDART: file of the CUDA runtime library. Default: the one that torch has loaded.
  std::string cudart;
  // PYALLREDUCE_NCCL: file of the NCCL library. Default: the one that torch has loaded, then the
  // installed package's, then the system's.
  std::string nccl;
  // PYALLREDUCE_PORT: port of the rendezvous when no launcher provides a store. Default:
  // MASTER_PORT + 1.
  int port = 0;
  // PYALLREDUCE_TIMEOUT_S: default of init(timeout_s=...), seconds.
  double timeout_s = 60.0;
  // PYALLREDUCE_TRACE: folder into which every rank's aggregators write their event record.
  // Default: none is written.
  std::string trace;
};

// Reads PYALLREDUCE_* anew. UsageError for an unknown name (it lists the known ones) and for a
// value that cannot be read.
Env read_env();
// TMPDIR, by default /tmp.
std::string temporary_folder();

}  // namespace pyar
