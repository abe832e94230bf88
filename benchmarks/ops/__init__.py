"""A bench file an operator: its cases, inputs, bytes, operations and contenders."""
