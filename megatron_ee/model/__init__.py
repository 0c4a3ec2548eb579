"""The model: frozen backbone, exits, the stage that holds them, and their loss.

Hidden states are ``[seq, batch, hidden]``; with sequence parallelism a rank holds ``[seq / tp, batch, hidden]``.
"""
