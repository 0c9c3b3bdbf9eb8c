"""How much to draft and to verify: what a step costs, what is accepted, and the controller (all
pure), and the scheduler that asks it."""
