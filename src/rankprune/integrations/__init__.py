"""TRP in other people's trainers. Each is imported by its own name, like rankprune.integrations.lightning."""
