"""Losses -> weights -> loss: the method itself, in torch. Nothing here knows a model, an engine, a file or the configuration.

    guidance.py    the equations: teacher losses onto student positions, which tokens are kept, the loss and its sums
    linear_ce.py   where the losses come from: one float32 loss a token out of hidden states and a head, no logits kept

The order of use: `linear_ce.token_loss` of the teacher, `guidance.gather_guide`, `linear_ce.token_loss` of the student,
`guidance.guided_loss`. docs/method.md explains the method and what the paper leaves open.
"""
