// What newer headers of the C and C++ libraries ask of newer libraries, for which older ones suffice: with these few
// definitions a library that is built with GCC 11 or later on a system of today loads on one with glibc 2.28 and GCC
// 8's libstdc++, which is what a wheel for manylinux_2_28 promises. Part of every library, and seen by none but itself
// (setup.py, `link_shared`). On older compilers, and with another standard library than GNU's, there is nothing to do.
#include <exception>
#include <new>
#include <sstream>

#if defined(__GLIBC__) && __has_include(<sys/single_threaded.h>)  // glibc 2.32
#include <sys/single_threaded.h>
// Whether reference counts of std::shared_ptr may do without atomic instructions, because there is one thread: never,
// which is always right.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif

#if defined(__GLIBCXX__)

// Default constructors of string streams, since GCC 9 in the library (GLIBCXX_3.4.26).
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();

#if _GLIBCXX_RELEASE >= 11

#if __cplusplus >= 202002L
// What a string stream holds, as C++20 reads it (GLIBCXX_3.4.29).
template std::string std::basic_stringbuf<char>::str() const&;
#endif

namespace std {
// GLIBCXX_3.4.29; what new[] calls for a length that is none.
void __throw_bad_array_new_length() { throw std::bad_array_new_length(); }
}  // namespace std

// Copies and ends of an exception_ptr, which GCC 11 writes inline around these two (CXXABI_1.3.13). Those that GCC 8 has
// in the library do the same; by their versions, because the names alone mean the inline ones.
extern "C" {
void convext_exception_ptr_of(void* self, void* object);  // an exception_ptr that holds the object, too
void convext_end_exception_ptr(void* self);               // holds it no longer
}
__asm__(".symver convext_exception_ptr_of, _ZNSt15__exception_ptr13exception_ptrC1EPv@CXXABI_1.3.11");
__asm__(".symver convext_end_exception_ptr, _ZNSt15__exception_ptr13exception_ptrD1Ev@CXXABI_1.3.3");

namespace std::__exception_ptr {
void exception_ptr::_M_addref() noexcept {
  void* another;  // an exception_ptr is this pointer; the reference that it counts is never given back
  convext_exception_ptr_of(&another, _M_exception_object);
}
void exception_ptr::_M_release() noexcept { convext_end_exception_ptr(this); }
}  // namespace std::__exception_ptr

#endif
#endif
