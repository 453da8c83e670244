"""Tables, reports and studies: everything that looks at runs and makes no pictures of its own."""
