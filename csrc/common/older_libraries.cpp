// What newer C and C++ libraries would add to the requirements of an object that is built beside them, defined
// here, inside it: the object then loads beside older ones (glibc 2.28 and GCC 8's libstdc++), down to which
// torch's own wheels go. Linked into both objects; symbols stay hidden, so nothing outside them changes.
#if defined(__linux__)

// glibc 2.32 tells here whether there is one thread, and std::shared_ptr then counts without atomics. Our
// answer is always "more than one".
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

#include <sstream>

#if defined(__GLIBCXX__) && _GLIBCXX_USE_CXX11_ABI
// GCC 9 exports the streams' default constructors; those that take a mode have been there before.
extern "C" __attribute__((visibility("hidden"))) void
_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev(void* place) {
  new (place) std::stringstream(std::ios_base::in | std::ios_base::out);
}

extern "C" __attribute__((visibility("hidden"))) void
_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev(void* place) {
  new (place) std::ostringstream(std::ios_base::out);
}
#endif

#endif  // __linux__
