"""The calls of an engine's client that may reach its loaded model: counted where nothing else can.

An engine core in a process of its own is reached by its client's requests alone, and a call such as
``collective_rpc``, with it ``LLM.apply_model``, is one of them. Whoever has looked at the model
since the last of these need not look again. An engine in its caller's process is the caller's to
touch at any time, and there nothing is counted. Pure; one count a process.

    pytest tests/unit/test_client_calls.py
"""


class ClientCalls:
    """Of this process."""

    def __init__(self) -> None:
        self.are_counted = False
        """Whether each call that may reach the model is counted here."""
        self.count = 0

    def begin(self, may_reach_the_model: bool) -> None:
        """A request of the client's has come, and is not carried out yet."""
        self.are_counted = True
        self.count += may_reach_the_model


CALLS = ClientCalls()
