"""The run file: schema, YAML with overrides, and the plan printed by `verst check`. Imports no torch."""
