"""Triton's interpreter, which runs kernels on CPU tensors when TRITON_INTERPRET=1: a way to check numbers, not to work.

Triton reads the variable when it decorates a kernel, so it must be set before the kernels are imported.
"""

import functools


@functools.cache
def interpreting() -> bool:
    """Whether kernels run in the interpreter."""
    import triton

    if not triton.knobs.runtime.interpret:
        return False
    _repair_loop_bounds()
    _check_no_overflow()
    return True


def _repair_loop_bounds() -> None:
    """Lets `range()` take a run-time scalar.

    The interpreter holds a scalar as an array of one element and calls int() on it, which NumPy refuses since 2.4.
    """
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index


def _check_no_overflow() -> None:
    """Leaves out the interpreter's check of every integer operation for overflow: half of its time."""
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
