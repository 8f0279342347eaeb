module manager

go 1.19
