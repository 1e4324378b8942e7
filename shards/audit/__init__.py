"""Find images of one lesion under different names: identical, changed, or photographed again."""
