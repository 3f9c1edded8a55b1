select current_database() as name, current_user as role
