"""Others' recipes, each written out plainly in one file that imports nothing of mygpt."""
