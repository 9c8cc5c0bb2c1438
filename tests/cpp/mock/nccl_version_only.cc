// A library that knows NCCL's version, and nothing else of it.
extern "C" __attribute__((visibility("default"))) int ncclGetVersion(int* version) {
  *version = MOCK_VERSION;
  return 0;
}
