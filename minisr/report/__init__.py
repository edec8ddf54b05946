"""What people look at: the table, the HTML page, `minisr show` and `minisr chat`."""
