"""What people read: the results table, the HTML page, `minisr show` and `minisr chat`."""
