"""torch's AdamW, without a word to torch's compiler.

torch.optim imports torch._dynamo with the first optimizer, to tell it where a compiled optimizer step has to be cut.
Importing it takes longer than importing torch itself. No optimizer step is compiled here, models are: whoever compiles
one pays for that import, and a start on a CPU or a --smoke does not.
"""

import inspect

import torch


class AdamW(torch.optim.AdamW):
    """The same numbers, arguments and state as torch.optim.AdamW, of which it takes the methods below undecorated."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
