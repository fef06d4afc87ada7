"""A container's own forward becomes a graph, and the facts that it stands on.

Why a plan cannot be stale. A plan is made from one run of the forward, on proxies. What that run did depends on its
arguments, which the plan's signature describes, and on what it read. User code, that is every Python frame of neither
torch nor the standard library, can read only through

1.  names: globals, closure cells, defaults. The function runs over globals and cells that note each look-up, and the
    audit refuses a frame of user code that does not;
2.  attributes and items of what it already holds. That is a stand-in, which notes each look-up; a container copied
    whole, all of it noted; or something that cannot change (numbers, strings, tuples of them, enum members);
3.  calls. Python functions are case 1. C functions, and those of torch and of the standard library, run only where they
    are listed as pure, and what they get is of the kinds above; all others are refused;
4.  the state of the process: modes, contexts, random numbers, files, time. It is reached by calls, case 3, which are
    refused, and by `with`, which is refused; the modes that torch keeps for every call (autocast, gradients, function
    and dispatch modes, tracers) are looked at by each call of the plan.

What was noted is checked before each call (python/guards.h), by identity, for numbers and strings by value. Tensors are
not among the facts: the plan reads them anew, from where they were found. What torch's own layers read of themselves is
noted as a whole where a plan computes them in their place (standard.py): their class's code, all settings, hooks, where
their parameters are. So a plan runs only where the forward would read the same again, and then it would do the same.

What cannot be noted is refused: that container runs its own Python, and its children keep their plans.
"""
