// Memory that a thread keeps from call to call.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace fastunet::cpu {

// A buffer that grows, in whole cache lines; to be thread_local.
class Kept {
 public:
  // What it held is lost.
  uint8_t* bytes(int64_t wanted) {
    if (wanted > size_) {
      kept_.reset();
      size_ = 0;
      kept_.reset(static_cast<uint8_t*>(::operator new(wanted, std::align_val_t(kCacheLine))));
      size_ = wanted;
    }
    return kept_.get();
  }

 private:
  static constexpr int64_t kCacheLine = 64;

  struct Delete {
    void operator()(uint8_t* bytes) const {
      ::operator delete(bytes, std::align_val_t(kCacheLine));
    }
  };

  std::unique_ptr<uint8_t, Delete> kept_;
  int64_t size_ = 0;
};

}  // namespace fastunet::cpu
