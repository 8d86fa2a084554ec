package main

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
)

const uploadMemory = 32 << 20

type fileMetadata struct {
	Path string `json:"path"`
	Mode int    `json:"mode"` // its decimal digits are read as octal ones
}

// Writes pairs of parts, metadata and file, one by one: an error leaves the earlier ones written.
func (s *server) uploadFiles(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseMultipartForm(uploadMemory); err != nil {
		fail(w, http.StatusBadRequest, "INVALID_REQUEST_BODY", "%v", err)
		return
	}
	defer r.MultipartForm.RemoveAll()
	descriptions, files := r.MultipartForm.File["metadata"], r.MultipartForm.File["file"]
	switch {
	case len(descriptions) == 0:
		fail(w, http.StatusBadRequest, "INVALID_FILE_METADATA", "metadata file is missing")
		return
	case len(files) == 0:
		fail(w, http.StatusBadRequest, "INVALID_FILE_CONTENT", "file is missing")
		return
	case len(descriptions) != len(files):
		fail(w, http.StatusBadRequest, "INVALID_FILE", "metadata and file count mismatch: %d vs %d", len(descriptions), len(files))
		return
	}
	for i := range files {
		var metadata fileMetadata
		text, err := descriptions[i].Open()
		if err == nil {
			err = json.NewDecoder(text).Decode(&metadata)
			text.Close()
		}
		if err != nil || metadata.Path == "" {
			fail(w, http.StatusBadRequest, "INVALID_FILE_METADATA", "invalid metadata: %v", err)
			return
		}
		content, err := files[i].Open()
		if err == nil {
			err = write(metadata, content)
			content.Close()
		}
		if err != nil {
			fail(w, http.StatusInternalServerError, "RUNTIME_ERROR", "%v", err)
			return
		}
	}
}

func write(metadata fileMetadata, content io.Reader) error {
	if err := os.MkdirAll(filepath.Dir(metadata.Path), 0o755); err != nil {
		return err
	}
	file, err := os.OpenFile(metadata.Path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := io.Copy(file, content); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	if metadata.Mode == 0 {
		return nil
	}
	mode, err := strconv.ParseUint(strconv.Itoa(metadata.Mode), 8, 32)
	if err != nil {
		return err
	}
	return os.Chmod(metadata.Path, fs.FileMode(mode)&fs.ModePerm)
}

func (s *server) downloadFile(w http.ResponseWriter, r *http.Request) {
	path := r.URL.Query().Get("path")
	file, err := os.Open(path)
	if err != nil {
		status, code := http.StatusInternalServerError, "RUNTIME_ERROR"
		if errors.Is(err, fs.ErrNotExist) {
			status, code = http.StatusNotFound, "FILE_NOT_FOUND"
		}
		fail(w, status, code, "%v", err)
		return
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil || info.IsDir() {
		fail(w, http.StatusInternalServerError, "RUNTIME_ERROR", "no file: %s", path)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", info.ModTime(), file)
}
