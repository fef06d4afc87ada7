// What the libraries show to the bindings of Python (csrc/python/), which are libraries of their own, one for each
// release of Python. All else is hidden.
#pragma once

#define CONVEXT_API __attribute__((visibility("default")))
