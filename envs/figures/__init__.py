"""Pictures of a benchmark: one file per kind, `style` has what they share. Only here matplotlib is imported."""
