#include "device/dynamic_library.h"

#include <dlfcn.h>
#include <link.h>

namespace pyar {

DynamicLibrary::DynamicLibrary(const LibrarySearch& search) {
  std::string tried;
  if (!search.path.empty()) {
    if (!open(search.path, 0, search.variable, tried))
      throw Error(search.variable + "=" + search.path + " cannot be loaded as " + search.name +
                  ":" + tried);
    return;
  }
  for (const std::string& soname : search.sonames)
    if (open(soname, RTLD_NOLOAD, "already loaded", tried)) return;
  tried.clear();  // that none is loaded yet is no news
  for (const std::string& folder : search.folders)
    for (const std::string& soname : search.sonames)
      if (open(folder + "/" + soname, 0, "installed package", tried)) return;
  for (const std::string& soname : search.sonames)
    if (open(soname, 0, "system", tried)) return;
  throw Error(search.name + " was not found:" + tried + "\n" + search.remedy + ", or set " +
              search.variable + " to the path of the library.");
}

bool DynamicLibrary::open(const std::string& file, int flags, std::string how, std::string& tried) {
  // RTLD_LOCAL: its symbols are ours alone. RTLD_NOW: what it lacks shows here, not in the first
  // collective.
  handle_ = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | flags);
  if (!handle_) {
    const char* const why = dlerror();
    tried.append("\n  ").append(why ? why : file.c_str());
    return false;
  }
  link_map* mapped = nullptr;
  path_ = dlinfo(handle_, RTLD_DI_LINKMAP, &mapped) == 0 ? mapped->l_name : file;
  how_ = std::move(how);
  return true;
}

void* DynamicLibrary::symbol(const char* name) const { return dlsym(handle_, name); }

}  // namespace pyar
