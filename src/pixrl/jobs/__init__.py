"""Begin a whole run, go on with one, or check its folder: align and personalize, fuse, and fuse of many pairs."""
