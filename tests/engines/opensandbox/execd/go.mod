module execd

go 1.26
