"""Where others' libraries come in: TRP in their trainers, decomposed models on the Hugging Face hub.

Each is imported by its own name, like rankprune.integrations.lightning, and needs the extra of the same name.
"""
