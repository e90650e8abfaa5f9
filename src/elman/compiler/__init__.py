"""From one step to a loop: trace, program, derivative, plan, and the backends that run it."""
