"""A container's own forward becomes a graph, and the facts that it stands on.

Why a plan cannot be stale. A plan is made from one run of the forward, on proxies. What that run did depends on its
arguments, which the plan's signature describes, and on what it read. User code, that is every Python frame of neither
torch nor the standard library, can read only through

1.  names: globals, closure cells, defaults. The function runs over globals and cells that note each look-up, and the
    audit refuses a frame of user code that does not;
2.  attributes and items of what it already holds. That is a stand-in, which notes each look-up; a container copied
    whole, all of it noted, and refused where it is changed; or something that cannot change (numbers, strings, tuples
    of them, enum members);
3.  proxies of values. They show what any tensor has, as nodes of the graph. Control flow by a value, its type, its
    identity, its hash or its text is refused, and so is comparing with None what may be None;
4.  calls. Python functions are case 1. C functions, and those of torch and of the standard library, run only where they
    are listed as pure (pure.py), whoever calls them; all others are refused. Layers are nodes. A layer or container
    whose own forward could not be captured, or that has hooks, may do anything: what the forward would read after such
    a call is refused, as is a list that such a call could change;
5.  the state of the process: modes, contexts, random numbers, files, time. It is reached by calls, case 4, which are
    refused, and by `with`, which is refused; the modes that torch keeps for every call (autocast, gradients, function
    and dispatch modes, tracers) are looked at by each call of the plan. Handlers of exceptions are refused, because an
    operation of a graph that raises would find none.

What was noted is checked before each call (python/guards.h), by identity, for numbers and strings by value. Tensors are
not among the facts: the plan reads them anew, from where they were found. What torch's own layers read of themselves is
noted as a whole where a plan computes them in their place (standard.py): their class's code, all settings, hooks, where
their parameters are. So a plan runs only where the forward would read the same again, and then it would do the same.

What cannot be noted is refused: that container runs its own Python, and its children keep their plans. Two things are
taken on trust: that nobody writes attributes into torch's own functions (`F.relu.flag = ...`), and that no other thread
changes a model in the middle of a call.
"""
