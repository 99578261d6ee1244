"""One file for each model family: how a Hugging Face config becomes Megatron's arguments, and which tensor goes where."""
